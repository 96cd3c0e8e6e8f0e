"""Devices are tried before they are used."""

from unittest import mock

import pytest
import torch
from conftest import (
    TINY,
    checkpoint,
    run_main,
)

from support import devices


@pytest.mark.parametrize("works", [True, False])
def test_a_gpu_gets_its_number_and_is_left_aside_if_it_cannot_work(
    works, set_device, monkeypatch, capsys
):
    """One that is asked for by name is never left aside."""
    conv2d = torch.nn.functional.conv2d
    broken = RuntimeError("CUDA error: no kernel image is available")
    if not works:  # an old GPU is found out by its first convolution; the CPU comes after it
        conv2d = mock.Mock(side_effect=[broken, mock.DEFAULT, broken], wraps=conv2d)
    monkeypatch.setattr("torch.nn.functional.conv2d", conv2d)
    if works:
        for name in ("auto", "cuda", "cuda:0"):
            assert devices.choose_device(name) == torch.device("cuda", 0)
            set_device.assert_called_with(torch.device("cuda", 0))
        assert capsys.readouterr() == ("", "")
        set_device.side_effect = RuntimeError("CUDA error: invalid device ordinal")
        with pytest.raises(ValueError, match="--device: cuda:1 cannot be used .*--device cpu"):
            devices.choose_device("cuda:1")
    else:
        assert devices.choose_device("auto").type in ("cpu", "mps")
        assert "cuda cannot be used (CUDA error" in capsys.readouterr().err
        with pytest.raises(ValueError, match="no kernel image"):
            devices.choose_device("cuda")
        set_device.assert_not_called()


def test_every_process_has_a_gpu_of_its_own_or_the_run_ends(set_device, as_process, monkeypatch):
    as_process(5, 1, 8)  # 1 on its machine
    for name in ("auto", "cuda"):
        assert devices.choose_device(name) == torch.device("cuda", 1)
        set_device.assert_called_with(torch.device("cuda", 1))
    for name in ("cuda:0", "mps"):
        with pytest.raises(ValueError, match=f"--device: {name} cannot be used .it serves one"):
            devices.choose_device(name)
    broken = RuntimeError("CUDA error: out of memory")
    monkeypatch.setattr("torch.nn.functional.conv2d", mock.Mock(side_effect=broken))
    with pytest.raises(ValueError, match="--device: cuda cannot be used .CUDA error"):
        devices.choose_device("auto")  # and does not train on a CPU beside seven GPUs


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_real_gpu_trains_and_draws(name, small_data, tmp_path):
    backend = torch.cuda if name == "cuda" else torch.backends.mps
    if not backend.is_available():
        pytest.skip(f"no {name} here")
    options = [*TINY, "--data-dir", small_data, "--output-dir", tmp_path, "--device", name]
    assert run_main(*options, "--epochs", 2, pictures=True) == (0, "")
    history = checkpoint(tmp_path)["history"]
    assert history[1]["train_loss"] < history[0]["train_loss"]


def test_bfloat16_is_taken_on_gpus_that_calculate_in_it_and_float16_nowhere(monkeypatch):
    supported, autocast = mock.Mock(return_value=True), mock.Mock()
    monkeypatch.setattr("torch.cuda.is_bf16_supported", supported)
    monkeypatch.setattr("torch.autocast", autocast)
    cuda, cpu, mps = torch.device("cuda:0"), torch.device("cpu"), torch.device("mps")
    assert devices.compute_dtype(cuda) == torch.bfloat16
    supported.assert_called_with(including_emulation=False)  # which is slower than float32
    devices.autocast(cuda)
    autocast.assert_called_once_with("cuda", torch.bfloat16)
    supported.return_value = False
    for device in (cuda, cpu, mps):
        assert devices.compute_dtype(device) == torch.float32
        with devices.autocast(device):
            pass
    autocast.assert_called_once()


def test_channels_come_last_but_on_apples_gpus():
    assert devices.memory_format(torch.device("mps")) == torch.preserve_format
    for name in ("cpu", "cuda:1"):
        assert devices.memory_format(torch.device(name)) == torch.channels_last


def test_pieces_are_as_large_as_250_images_of_mnist():
    for shape, count in (((1, 28, 28), 250), ((3, 128, 128), 11), ((9, 3, 4, 4), 12250)):
        assert devices.images_together(shape) == count
    assert devices.images_together((1, 1000, 1000)) == 1
    assert devices.pieces(501, (1, 28, 28)) == [slice(0, 250), slice(250, 500), slice(500, 501)]
