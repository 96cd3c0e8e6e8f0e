"""What a training program needs besides diffusion. Skip this folder to understand diffusion.

The lesson is in forward_reverse_process.py and train_diffusion.py, one folder up. Each module here
answers one question about the program around it, and none imports the lesson:

    messages        What is said, and how does an error end the program?
    optimizers      Muon, Adam, averaged weights: how do gradients become steps?
    processes       Several processes: who am I, and what do the others have?
    interruption    What do Ctrl-C, SIGTERM and a closed terminal do?
    files           How is a file written whole or not at all?
    devices         Which device calculates, in which layout and precision?
    checkpoints     What is in a checkpoint, and how is it read?
    folders         How does a folder of pictures become images and labels?
    datasets        Where do images and labels come from?
    pictures        How is what was computed drawn?
    run             Where does a training run stand?
    options         What may be typed, and what does a resumed run keep?
"""
