"""Does a test notice? Changes the code in one place after another and runs the tests next to it.

    python tests/mutants.py [WORD ...]

Works on a copy of the tracked files; WORD: only mutants whose line of the table holds one of them.
Prints a table of what survived and ends with 1 if a tenth or more did.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests.paths import ROOT


class Mutant(NamedTuple):
    """`old`, which must stand once in `file`, becomes `new`; one of `tests` must then fail."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def _mutants(file: str, tests: str, *changes: tuple[str, str]) -> list[Mutant]:
    names = (Path("tests/core", name) for name in tests.split())
    paths = tuple(str(name.with_name(f"test_{name.name}.py")) for name in names)
    return [Mutant(f"star_core/{file}.py", old, new, paths) for old, new in changes]


MUTANTS = [
    *_mutants(
        "losses",
        "losses verify",
        ("fftfreq(height, 0.5, device", "fftfreq(height, 1.0, device"),
        ("rfftfreq(width, 0.5, device", "rfftfreq(width, 1.0, device"),
        ("cutoff: float = 0.35", "cutoff: float = 0.15"),
        ("softness: float = 0.05", "softness: float = 0.2"),
        ("(config.softness / 4)", "config.softness"),
        (
            "(difference * low).mean((1, 2, 3, 4)) / low.mean()",
            "(difference * low).mean((1, 2, 3, 4))",
        ),
        (
            "(difference * (1 - low)).mean((1, 2, 3, 4)) / (1 - low).mean()",
            "(difference * (1 - low)).mean((1, 2, 3, 4))",
        ),
        (
            'tau if shape == "linear" else torch.expm1(tau) / torch.expm1(torch.ones_like(tau))',
            "tau",
        ),
        ("alpha: float = 2.0", "alpha: float = 1.0"),
        ("tau = t.float() / (timesteps - 1)", "tau = 1 - t.float() / (timesteps - 1)"),
        ("total = config.beta * (1 - ramp", "total = config.beta * (ramp"),
        ("config.beta * (1 - ramp(tau, config.shape))", "config.beta"),
        ("x_0 - target, norm=", "x_0 - target.detach() * 0.9, norm="),
        ('norm="ortho"', 'norm="backward"'),
        ("return total * c, total * (1 - c)", "return total * (1 - c), total * c"),
    ),
    *_mutants(
        "training/objective",
        "training/trainer training/cogvideox",
        ("x_0 = torch.where(degraded[:, None, None, None, None], lq, batch.hq)", "x_0 = batch.hq"),
        (
            "frequency = self.df_error(clean, x_0, batch)",
            "frequency = self.df_error(clean, lq, batch)",
        ),
        ("loss = velocity + frequency", "loss = velocity"),
        (
            "df_loss(clean, target, batch.t, config.df)",
            "df_loss(clean, target, batch.t, DFLossConfig())",
        ),
        ("return int(u * config.noise_level)", "return int(u * min(config.noise_level, 900))"),
        ("u = 0.75 + 0.25 * u", "u = 0.25 * u"),
        ("and chance < config.degraded", "and chance < config.degraded * 0.5"),
        ("enabled=self.config.bf16", "enabled=False"),
        ("x_0[later] = schedule.x_0(", "schedule.x_0("),
        (
            "noise.append(torch.randn(sample.hq.shape, generator=generator))",
            "noise.append(sample.hq * 0)",
        ),
    ),
    *_mutants(
        "training/distillation",
        "training/distillation training/finetune",
        ("lora_strength(self.network, 0.0)", "lora_strength(self.network, 1.0)"),
        ("(step // phase + 1) * phase", "torch.full_like(step, count)"),
        ("torch.where(first, batch.lq, batch.hq)", "batch.hq"),
        ("step + 1 < border", "step + 2 < border"),
        ("guided_velocity(v_c, v_u, scale, self.rescale)", "v_c"),
        ("self.rescale = teacher.cfg_rescale", "self.rescale = 0.0"),
        ("(x_next - ratio * x_t)", "(x_next + ratio * x_t)"),
        ("last := border == count", "last := border > 0"),
        ('"cfg": 1.0', '"cfg": teacher.cfg'),
        ('"noise_level": teacher.noise_level', '"noise_level": 900'),
        ('{"spacing": "diffusers"}', "{}"),
        (".sub(1).clamp(min=0)", ".clamp(max=len(self.timesteps) - 1)"),
    ),
    *_mutants(
        "training/adversarial",
        "training/adversarial",
        ("self.distill.adversarial * adversarial + heads", "heads"),
        (
            "self.distill.adversarial * adversarial + heads",
            "self.distill.adversarial * adversarial",
        ),
        ("lora_strength(self.network, 0.0)", "lora_strength(self.network, 1.0)"),
        ("p.detach() for name, p", "p for name, p"),
        ("[x.detach() for x in shown]", "shown"),
        ("_mean(torch.neg, opinions)", "_mean(torch.abs, opinions)"),
        ("F.relu(1 - x), of_real", "F.relu(1 - x), of_false"),
        ("- (ratio * sigma_end) ** 2", ""),
        ("times[border] + 1", "0 * times[border]"),
        ("manual_seed(seed) for seed in batch.seeds", "manual_seed(0) for seed in batch.seeds"),
    ),
    *_mutants(
        "training/checkpointing",
        "training/adversarial",
        ("lora_strength(module, *strengths) if strengths else nullcontext()", "nullcontext()"),
    ),
    *_mutants(
        "lora",
        "lora training/initialise",
        ("scale = self.strength * self.alpha / self.rank", "scale = self.alpha / self.rank"),
        ("layer.strength = value", "layer.strength = 1.0 - value"),
        ('"local" in name or', '"nothing" in name or'),
        ("alpha / len(down)", "alpha"),
        ("if strength:", "if True:"),
        ("self.strength * scale * change", "scale * change"),
        ("layer.strength * layer.alpha / layer.rank", "layer.alpha"),
    ),
    *_mutants(
        "diffusion/denoiser",
        "diffusion/step_cache",
        ("None if is_last else cache", "None if False else cache"),
    ),
    *_mutants(
        "diffusion/step_cache",
        "diffusion/step_cache",
        ("self._timestep - timestep) > self.limit", "self._timestep - timestep) > 0.1"),
        ("change.item() / passed", "change.item()"),
        ("return self._x_0.clone()", "return self._x_0"),
        ("= x_0.clone(), timestep", "= x_0, timestep"),
    ),
    *_mutants(
        "training/videos",
        "training/initialise training/dataset training/finetune training/cogvideox",
        ("item() < self.caption_dropout", "item() < 0.9"),
    ),
    *_mutants(
        "training/videos",
        "training/dataset",
        ("replace(self.recipe, sharpen=False)", "self.recipe"),
        ("generator.set_state(state)", "pass"),
        ("return (self.frames - 1) * self.interval + 1", "return self.frames"),
        ("self._text = text and lru_cache(TEXTS)(", "self._text = text and ("),
    ),
    *_mutants(
        "training/loading",
        "training/dataset",
        ("generator.set_state(drawn.state)", "pass"),
    ),
    *_mutants(
        "training/trainer",
        "training/states training/trainer",
        ("skipped += 1", "skipped = 0"),
        ("recent.append(not math.isfinite(norm))", "recent.append(False)"),
        ("accelerator.backward(loss / execution.accumulate)", "accelerator.backward(loss)"),
    ),
    *_mutants(
        "training/states",
        "training/states",
        ('"samples of a step": samples, ', ""),
        ("for old in self.paths()[: -self.keep]:", "for old in []:"),
        ("name not in MAY_CHANGE and", ""),
    ),
    *_mutants(
        "training/optimizers",
        "training/states training/trainer",
        ("            value.copy_(kept)", "            pass"),
    ),
    *_mutants(
        "vae/small_decoder",
        "vae/small_decoder",
        ('z * self.config["scaling_factor"]', "z"),
        (
            "super().forward(torch.tanh(latents / 3) * 3) * 2 - 1",
            "super().forward(latents) * 2 - 1",
        ),
        ("self.linear(latents) + self.conv_out", "self.conv_out"),
    ),
    *_mutants(
        "cli/arguments",
        "cli training/finetune",
        ("interval=args.interval", "interval=2"),
    ),
    *_mutants(
        "cli/training",
        "cli training/finetune",
        ("bf16=args.bf16,\n        checkpointing", "bf16=False,\n        checkpointing"),
        ("checkpointing=args.checkpointing,\n        df=", "checkpointing=False,\n        df="),
        ("alpha=args.df_alpha", "alpha=2.0"),
        ("beta=args.df_beta", "beta=1.0"),
        ("noise_level=1000", "noise_level=900"),
    ),
    *_mutants(
        "degradation/recipes",
        "degradation/pipeline",
        ("_JPEG = Jpeg(quality=(30, 95))", "_JPEG = Jpeg(quality=(90, 95))"),
        ("_NOISE_1 = Noise(sigma=(1 / 255, 30 / 255)", "_NOISE_1 = Noise(sigma=(1 / 255, 3 / 255)"),
        ("_NOISE_2 = Noise(sigma=(1 / 255, 25 / 255)", "_NOISE_2 = Noise(sigma=(1 / 255, 3 / 255)"),
        ("Kernels(sigma=(0.2, 3))", "Kernels(sigma=(0.2, 0.3))"),
        (
            "Kernels(sigma=(0.2, 1.5), probability=0.8)",
            "Kernels(sigma=(0.2, 0.3), probability=0.8)",
        ),
        ("        sharpen=True,\n", ""),
        ("drift=0.0 if reference else 0.1", "drift=0.1"),
    ),
    *_mutants(
        "degradation/pipeline",
        "degradation/pipeline degradation/files",
        ("return ops.usm_sharpen(video) if recipe.sharpen else video", "return video"),
        (
            "return [min(max(value + swing * math.sin(angle), low), high) for angle in angles]",
            "return value",
        ),
        ("(video.clamp(0, 1) * 255).round() / 255", "video.clamp(0, 1)"),
        ("w = math.floor(clean[1] / self.scale * scale + 1e-6)", "pass"),
        ("range(done, done + len(part))", "range(len(part))"),
    ),
    *_mutants(
        "degradation/ops",
        "degradation/ops verify",
        ("-0.5 * (axis / sigma[:, None]) ** 2", "-(axis / sigma[:, None]) ** 2"),
        ("weight: float = 0.5", "weight: float = 0.25"),
        ("threshold: float = 10 / 255", "threshold: float = 20 / 255"),
        ("1 if grey else c", "c"),
        ("inverse = rotation @", "inverse = rotation.T @"),
        ('mode = "reflect" if', 'mode = "replicate" if'),
        ("kernel[centre] = cutoff**2 / (4 * math.pi)", "kernel[centre] = cutoff / (4 * math.pi)"),
    ),
    *_mutants(
        "windows/chunking",
        "windows/chunking pipeline",
        ("gaps = math.ceil((total - length) / stride)", "gaps = (total - length) // stride + 1"),
        ("starts = (i * (total - length) // gaps", "starts = (i * (length - overlap)"),
        ("math.ceil((total - 1.25 * length) / stride)", "math.ceil((total - length) / stride)"),
        ("(torch.arange(length) + 0.5)", "torch.arange(length)"),
        ("left[len(left) - shared + shared // 2 :] = 0", "left[len(left) - shared :] = 0"),
        (
            "left[len(left) - shared :] *= ramp(shared).flip(0)",
            "left[len(left) - shared :] *= ramp(shared)",
        ),
        ("x_0[:, :, frames] += weight *", "x_0[:, :, frames] = weight *"),
        ("range(0, total - length, stride), total - length]", "range(0, total - length, stride)]"),
        (
            "return (frames - 1) // latent_frames * latent_frames + 1",
            "return frames // latent_frames * latent_frames + 1",
        ),
    ),
    *_mutants(
        "windows/tiling",
        "windows/tiling models/latent_tiles",
        (
            "overlap = self.size // unit, -(-self.overlap // unit)",
            "overlap = self.size // unit, self.overlap // unit",
        ),
        (
            "weight = row_weight[:, None] * column_weight",
            "weight = row_weight[:, None] * column_weight.flip(0)",
        ),
        ("range(step * w.start, step * w.stop + rest)", "range(step * w.start, step * w.stop)"),
        (
            "range(w.start * unit_out, w.stop * unit_out) for w in windows]",
            "range(w.start, w.stop) for w in windows]",
        ),
        ("max(0, -(-(self.overlap - rest) // step))", "0"),
    ),
    *_mutants(
        "diffusion/noise",
        "diffusion/noise pipeline",
        ('f"{self.seed} {purpose} {step} {frame}"', 'f"{self.seed} {purpose} {frame}"'),
        ('f"{self.seed} {purpose} {step} {frame}"', 'f"{self.seed} {step} {frame}"'),
        ("offset + i, (b, c, h, w)", "i, (b, c, h, w)"),
        ("(torch.arange(w) + self.origin[1]) % self.canvas[1]", "torch.arange(w) % self.canvas[1]"),
        (
            "return -path_increment / (sigma - sigma_next).sqrt()",
            "return path_increment / (sigma - sigma_next).sqrt()",
        ),
        ("transpose(1, 2).normal_", "reshape(b, c, f, h, w).normal_"),
    ),
    *_mutants(
        "diffusion/schedule",
        "diffusion/schedule verify",
        ("FAST_MIDDLE = 500", "FAST_MIDDLE = 450"),
        ("scale_max: float = 4.0", "scale_max: float = 2.0"),
        ("return self.t(edm_sigma).round().long()", "return self.t(edm_sigma).long()"),
        (
            "return (alpha * x_t - x_0) / sigma",
            "return (x_t - x_0) / sigma",
        ),
        ("timesteps = timesteps[:-1]", "timesteps = timesteps"),
        ("if exact and steps > 1:", "if False:"),
        (".unique_consecutive()", ""),
        ("t_max = noise_level - 1", "t_max = noise_level"),
    ),
    *_mutants(
        "diffusion/samplers",
        "diffusion/samplers verify",
        ("gain = -torch.expm1(-h - eta * h)", "gain = -torch.expm1(-h)"),
        ("(0.5 * gain if midpoint", "(gain if midpoint"),
        ("slope = (x_0 - previous) / (h_previous / h)", "slope = (x_0 - previous)"),
        (
            "torch.sqrt(-torch.expm1(-2 * eta * h)) * s_noise",
            "torch.sqrt(-torch.expm1(-eta * h)) * s_noise",
        ),
        ("x = x + (slope + slope_next) / 2 * (sigma_next - sigma)", "x = x_next"),
        ("return denoise(x / torch.sqrt(sigma**2 + 1), sigma)", "return denoise(x, sigma)"),
        ("sigmas[0].isinf() else start * sigmas[0]", "sigmas[0].isinf() else start"),
        (
            "x = send(noise(step, sigma, sigma_next), x.device, x.dtype)\n            x = x_0",
            "pass\n            x = x_0",
        ),
        (
            "scale = torch.sqrt(raised**2 - sigma**2) * s_noise",
            "scale = (raised - sigma) * s_noise",
        ),
    ),
    *_mutants(
        "diffusion/denoiser",
        "diffusion/denoiser verify",
        ("v = v_u + scale * (v_c - v_u)", "v = v_c + scale * (v_c - v_u)"),
        ("v_c.std(std, keepdim=True) /", "v_u.std(std, keepdim=True) /"),
        ("rescale * ratio + 1 - rescale", "ratio"),
        ("hint[:, :, window.start : window.stop]", "hint[:, :, : len(window)]"),
        ("((low <= t) & (t < high))", "((low <= t) & (t <= high))"),
    ),
    *_mutants(
        "memory",
        "memory standin",
        ("self.unload(module)\n                raise", "raise"),
        ("@torch.inference_mode(False)\n    @torch.no_grad()", "@torch.no_grad()"),
        ("_STATUS_ALLOC_FAILED|", ""),
    ),
    *_mutants(
        "devices",
        "devices standin",
        ("dtype or x.dtype, non_blocking=no_wait)", "dtype or x.dtype)"),
        ("return copy.copy_(x, non_blocking=no_wait)", "return copy.copy_(x)"),
        ("if torch.backends.mps.is_available():", "if False:"),
    ),
    *_mutants(
        "shot_run",
        "precision",
        ("if is_finite(result):", "if True:"),
        ("if not last and not is_finite(x_0):", "if False:"),
    ),
    *_mutants(
        "resume",
        "resume batch",
        ("if path.name == self._name(name, data):", "if True:"),
        ('if not path.name.startswith(f"{identity}.")]', "if False]"),
        ("os.fsync(file.fileno())", "pass"),
        ("text = json.dumps(facts, sort_keys=True", "text = json.dumps(sorted(facts)"),
        ("if kind is None and not self._keep or", "if kind is None or"),
        ('digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())', "pass"),
        ("part.unlink(missing_ok=True)\n            raise", "raise"),
    ),
]


def main(words: list[str]) -> int:
    chosen = [m for m in MUTANTS if not words or any(w in f"{m.file} {m.old}" for w in words)]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        tracked = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
        for name in filter(None, tracked.split("\0")):
            target = tree / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)
        survivors = [mutant for mutant in chosen if not _noticed(mutant, tree)]
    print(f"\n{len(survivors)} of {len(chosen)} mutants survived")
    for mutant in survivors:
        print(f"{mutant.file}: {mutant.old!r} -> {mutant.new!r}")
    return int(10 * len(survivors) >= len(chosen))


def _noticed(mutant: Mutant, tree: Path) -> bool:
    path = tree / mutant.file
    whole = path.read_text(encoding="utf-8")
    if whole.count(mutant.old) != 1:
        raise SystemExit(
            f"{mutant.file} has {mutant.old!r} {whole.count(mutant.old)} times, not once"
        )
    path.write_text(whole.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        tests = [name for name in mutant.tests if (tree / name).exists()]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "--no-header",
            "-p",
            "no:cacheprovider",
        ]
        result = subprocess.run([*command, *tests], cwd=tree, capture_output=True, text=True)
    finally:
        path.write_text(whole, encoding="utf-8")
    if result.returncode not in (0, 1):
        raise SystemExit(f"pytest ended with {result.returncode}:\n{result.stdout[-2000:]}")
    noticed = result.returncode == 1
    print(f"{'noticed ' if noticed else 'SURVIVED'} {mutant.file}: {mutant.old!r}", flush=True)
    return noticed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
