from functools import partial

import pytest
import torch

from star_core.cli import main
from star_core.model import BUILT_IN
from star_core.training.decoder import _decoded, decoding_flops, small_decoder
from star_core.training.plan import vae_on_meta
from star_core.training.videos import stored_clips
from star_core.vae.load import load_frame_vae
from star_core.vae.patch import PatchGeometry
from star_core.vae.small_decoder import load_decoder
from star_core.vae.svd import SVDGeometry
from star_core.video_io import open_video
from tests.films import write_shards


@pytest.mark.parametrize("geometry", [PatchGeometry(), SVDGeometry()])
@pytest.mark.parametrize("share", [0.1, 0.3])
def test_a_decoder_takes_the_share_of_compute_that_it_is_given(geometry, share):
    with torch.device("meta"):
        decoder = small_decoder(geometry, share).build()
    vae = vae_on_meta(geometry)
    own = decoding_flops(vae.decode_window, vae.latent_channels)
    small = decoding_flops(partial(_decoded, decoder), vae.latent_channels)
    assert small <= share * own
    with pytest.raises(ValueError, match="smallest decoder takes"):
        small_decoder(geometry, 1e-6)


def test_a_trained_decoder_shows_what_the_own_one_shows_and_upscale_takes_it(tmp_path, capsys):
    shards = write_shards(tmp_path)
    command = ["train", "--model", "tiny", "--trains", "decoder", "--data", str(shards)]
    command += ["--clip-frames", "2", "--interval", "1", "--size", "32x24", "--workers", "0"]
    command += ["--out", str(tmp_path / "out"), "--recipe", "fixed-mild", "--validate", str(shards)]
    assert main([*command, "--steps", "20"]) == 0
    path = tmp_path / "out" / "decoder.safetensors"
    vae, decoder = load_frame_vae(BUILT_IN["tiny"][1]), load_decoder(path)
    assert stored_clips(shards)
    z = vae.encode(torch.rand(1, 3, 2, 24, 32) * 2 - 1)
    flat = vae.encode(torch.zeros(1, 3, 2, 24, 32))
    own, small, nothing = vae.decode_window(z), _decoded(decoder, z), vae.decode_window(flat)
    assert (small - own).abs().mean() < 0.5 * (nothing - own).abs().mean()
    source = next((tmp_path / "films").glob("*.mkv"))
    whole = ["--vae", str(path.with_name("vae.safetensors"))]
    for name, more in (("own", []), ("small", ["--decoder", str(path)]), ("whole", whole)):
        out = tmp_path / f"{name}.mkv"
        assert main(["upscale", str(source), str(out), "--scale", "1", *more]) == 0
    pictures = [
        next(iter(open_video(tmp_path / f"{name}.mkv"))) for name in ("own", "small", "whole")
    ]
    assert torch.equal(pictures[1], pictures[2])
    assert 0 < (pictures[0] - pictures[1]).abs().mean() < 0.1
    assert main(["upscale", str(source), str(tmp_path / "b.mkv"), "--decoder", "none.pt"]) == 2
    assert "correct --decoder" in capsys.readouterr().err
    assert main([*command, "--plan"]) == 2
