"""Autoencoders: exact inverses, slices in time, and a tiny saved diffusers model."""

import builtins

import pytest
import torch

from msc.pretrain.diffusion.autoencoder import CHUNK, OVERLAP, decode_stream, open_autoencoder, to_float, to_uint8

HAAR = ["haar", "haar:1x2x2", "haar:2x4x4", "haar:4x1x1", "haar:4x8x8"]


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def all_bytes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("spec", ["pixels", *HAAR])
def test_inverse_energy_and_shape(spec):
    autoencoder = open_autoencoder(spec)
    video = noise(2, 3, 8, 3, 16, 24)
    latents = autoencoder.encode(video)
    ft, fs = autoencoder.temporal_factor, autoencoder.spatial_factor
    assert latents.shape == (2, 3, 8 // ft, autoencoder.channels, 16 // fs, 24 // fs)
    assert latents.shape[2] == autoencoder.latent_frames(8)
    assert autoencoder.video_frames(latents.shape[2]) == 8
    assert (autoencoder.decode(latents) - video).abs().max() < 1e-12
    assert abs(latents.square().sum() / video.square().sum() - 1) < 1e-12


@pytest.mark.parametrize("spec", ["pixels", *HAAR])
def test_bytes_come_back_exactly(spec):
    autoencoder = open_autoencoder(spec)
    video = all_bytes(8, 3, 32, 32)
    video.view(-1)[:256] = torch.arange(256)
    latents = autoencoder.encode(video)
    assert latents.dtype == torch.float32
    assert torch.equal(to_uint8(autoencoder.decode(latents)), video)


@pytest.mark.parametrize("spec", ["haar", "haar:4x2x2"])
def test_the_transform_is_linear_and_orthogonal(spec):
    autoencoder = open_autoencoder(spec)
    ft, fs = autoencoder.temporal_factor, autoencoder.spatial_factor
    size = 3 * ft * fs * fs
    units = torch.eye(size, dtype=torch.float64).reshape(size, ft, 3, fs, fs)
    matrix = autoencoder.encode(units).reshape(size, size)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-14)


def test_first_channels_are_the_block_mean():
    autoencoder = open_autoencoder("haar:2x4x4")
    video = noise(4, 3, 8, 8)
    mean = video.reshape(2, 2, 3, 2, 4, 2, 4).mean(dim=(1, 4, 6))
    assert torch.allclose(autoencoder.encode(video)[:, :3], mean * 32**0.5)


@pytest.mark.parametrize("spec", ["pixels", *HAAR])
def test_slices_of_time_are_independent(spec):
    autoencoder = open_autoencoder(spec)
    video = all_bytes(12, 3, 8, 8)
    whole, ft = autoencoder.encode(video), autoencoder.temporal_factor
    assert autoencoder.slices
    for start, stop in ((0, 1), (1, 3), (2, 12 // ft)):
        assert torch.equal(autoencoder.encode(video[start * ft : stop * ft]), whole[start:stop])
        assert torch.equal(autoencoder.decode(whole[start:stop]), autoencoder.decode(whole)[start * ft : stop * ft])


def test_bytes_and_floats():
    assert to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]
    assert to_float(torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.float32
    assert to_uint8(torch.tensor([-3.0, -1.0, 0.0, 1.0, 7.0])).tolist() == [0, 0, 128, 255, 255]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(every)), every)
    with pytest.raises(ValueError, match="int64"):
        to_float(torch.arange(3))


def test_gradients_reach_the_pixels():
    video = noise(2, 3, 4, 4).requires_grad_()
    open_autoencoder("haar").encode(video).square().sum().backward()
    assert torch.allclose(video.grad, 2 * video.detach())


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("harr", "haar:TxHxW"),
        ("diffusers:", "diffusers:FOLDER"),
        ("haar:2x3x3", "3 is not a power of two"),
        ("haar:0x2x2", "0 is not a power of two"),
        ("haar:2x2x4", "height, 2, and width, 4"),
        ("haar:2x2", "unknown"),
    ],
)
def test_unknown_specs_are_named(spec, words):
    with pytest.raises(ValueError, match=words):
        open_autoencoder(spec)


def test_sizes_that_do_not_fit_are_named():
    haar = open_autoencoder("haar:4x8x8")
    haar.check(8, 64, 64)
    with pytest.raises(ValueError, match=r"9 video frames.*multiple of 4; the nearest is 8"):
        haar.check(9, 64, 64)
    with pytest.raises(ValueError, match=r"width of 60 pixels.*multiple of 8"):
        haar.check(8, 64, 60)
    with pytest.raises(ValueError, match="height of 65"):
        haar.encode(noise(4, 3, 65, 64))
    with pytest.raises(ValueError, match=r"\[4, 1, 64, 64\]"):
        haar.encode(noise(4, 1, 64, 64))
    with pytest.raises(ValueError, match="frames, 768, height"):
        haar.decode(noise(4, 3, 8, 8))


@pytest.mark.parametrize("spec", ["pixels", "haar"])
@pytest.mark.parametrize("sizes", [[1] * 5, [3, 2], [20, 1]])
def test_parts_decode_to_the_bits_of_the_whole(spec, sizes):
    autoencoder = open_autoencoder(spec)
    latents = torch.randn(2, sum(sizes), autoencoder.channels, 2, 3)
    parts = list(decode_stream(autoencoder, latents.split(sizes, 1)))
    assert torch.equal(torch.cat(parts, 1), to_uint8(autoencoder.decode(latents)))
    assert parts[0].shape[1] == autoencoder.video_frames(min(sizes[0], CHUNK)), "frames come as latents do"


# Saved diffusers models ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[2.0, 1.0, 0.5, 3.0],
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("wan")
    model.save_pretrained(folder)
    return model.eval(), folder


def test_diffusers_video(wan):
    model, folder = wan
    autoencoder = open_autoencoder(f"diffusers:{folder}")
    assert (autoencoder.channels, autoencoder.spatial_factor, autoencoder.temporal_factor) == (4, 8, 4)
    assert not autoencoder.slices
    video = all_bytes(2, 9, 3, 32, 48)
    latents = autoencoder.encode(video)
    assert latents.shape == (2, 3, 4, 4, 6)
    assert latents.dtype == torch.float32
    assert not latents.requires_grad
    assert torch.equal(latents, autoencoder.encode(video)), "encoding must not sample"
    assert torch.equal(latents[1], autoencoder.encode(video[1]))

    with torch.no_grad():
        mode = model.encode(to_float(video[0]).transpose(0, 1)[None]).latent_dist.mode()
    mean, std = (torch.tensor(model.config[name])[:, None, None, None] for name in ("latents_mean", "latents_std"))
    assert torch.allclose(latents[0].transpose(0, 1), (mode[0] - mean) / std, atol=1e-5)

    pixels = autoencoder.decode(latents)
    assert pixels.shape == video.shape
    with torch.no_grad():
        assert torch.allclose(pixels[0].transpose(0, 1), model.decode(mode).sample[0], atol=1e-4)
    # Parts, of which the second looks back to the first frame and the last does not
    long = torch.randn(1, 3 * CHUNK + 3, 4, 2, 2)
    parts = list(decode_stream(autoencoder, long.split(5, 1)))
    assert max(part.shape[1] for part in parts) <= autoencoder.temporal_factor * CHUNK
    assert len(long[0]) > OVERLAP + CHUNK
    whole = to_uint8(autoencoder.decode(long))
    assert (torch.cat(parts, 1).int() - whole.int()).abs().max() <= 1
    # Causal: the first latent frames do not change with what follows.
    assert torch.equal(autoencoder.encode(video[0, :5]), latents[0, :2])


def test_diffusers_counts_frames(wan):
    autoencoder = open_autoencoder(f"diffusers:{wan[1]}")
    for frames, latent in ((1, 1), (5, 2), (81, 21)):
        assert autoencoder.latent_frames(frames) == latent
        assert autoencoder.video_frames(latent) == frames
    with pytest.raises(ValueError, match=r"8 video frames.*1 \+ a multiple of 4; the nearest is 9"):
        autoencoder.check(8, 32, 32)
    with pytest.raises(ValueError, match="width of 36"):
        autoencoder.check(9, 32, 36)


def test_diffusers_half_precision(wan):
    full = open_autoencoder(f"diffusers:{wan[1]}")
    half = open_autoencoder(f"diffusers:{wan[1]}", dtype=torch.bfloat16)
    video = all_bytes(5, 3, 16, 16)
    assert half.encode(video).dtype == torch.float32
    assert half.decode(half.encode(video)).dtype == torch.float32
    assert (half.encode(video) - full.encode(video)).abs().max() < 0.1


def test_diffusers_images_frame_by_frame(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=(4, 4), norm_num_groups=2, scaling_factor=0.5, shift_factor=0.25,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "vae")
    autoencoder = open_autoencoder(f"diffusers:{tmp_path}")  # a pipeline's folder will do
    assert (autoencoder.channels, autoencoder.spatial_factor, autoencoder.temporal_factor) == (4, 2, 1)
    assert autoencoder.slices
    video = all_bytes(3, 3, 16, 24)
    latents = autoencoder.encode(video)
    assert latents.shape == (3, 4, 8, 12)
    with torch.no_grad():
        mode = model.eval().encode(to_float(video)).latent_dist.mode()
    assert torch.allclose(latents, (mode - 0.25) * 0.5, atol=1e-5)
    assert autoencoder.decode(latents).shape == video.shape


def test_diffusers_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        open_autoencoder(f"diffusers:{tmp_path}/nothing")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        open_autoencoder(f"diffusers:{tmp_path}")


def test_diffusers_unreadable_weights(wan, tmp_path):
    (tmp_path / "config.json").write_bytes((wan[1] / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"cannot read the autoencoder.*safetensors"):
        open_autoencoder(f"diffusers:{tmp_path}")
    # A pickle may run code when it is read: it must be refused even where it is all there is.
    torch.save(wan[0].state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot read the autoencoder.*safetensors"):
        open_autoencoder(f"diffusers:{tmp_path}")


def test_diffusers_not_installed(wan, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "diffusers":
            raise ImportError("No module named 'diffusers'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"msc-video\[autoencoders\]"):
        open_autoencoder(f"diffusers:{wan[1]}")
