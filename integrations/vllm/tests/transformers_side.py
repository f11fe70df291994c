"""What transformers answers under `vlmtok.compress`: the reference of an engine's answers, run in a process of its own.

`reference(folder, specs, prompts, cache)` runs what is not in the cache yet; a file of the cache holds one setting's
answers and is found by what it depends on: the checkpoint, the setting, the prompts, the versions and vlmtok's source.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Asked:
    """A prompt.

    Attributes:
        text: with a mark for each picture (`checkpoints.prompt`), as the processor takes it.
        pictures: RGB, in the order of their marks.
    """

    text: str
    pictures: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What transformers says.

    Attributes:
        ids: greedy choices, one for each step.
        logprobs: of the whole vocabulary, float32 `[steps, vocabulary]`.
        prompt: ids of the prompt with its placeholders expanded, before anything is cut.
        rows: rows of the prompt that the first decoder layer got.
    """

    ids: list[int]
    logprobs: Tensor
    prompt: list[int]
    rows: int


def reference(
    folder: Path,
    specs: Sequence[str | None],
    prompts: Sequence[Asked],
    cache: Path,
    steps: int = 6,
    zeroed: Sequence[str] = (),
) -> dict[str | None, list[Answer]]:
    """Answers by setting, computed in another process where the cache lacks them.

    Args:
        folder: of the checkpoint.
        specs: settings of `vlmtok.compress`; None is the bare model.
        prompts: each is run alone.
        cache: folder of the files.
        steps: tokens of an answer.
        zeroed: inputs of the model that are set to 0; ``token_type_ids`` makes Gemma 3 causal within pictures too, as
            vLLM's attention on a CPU is.

    Raises:
        RuntimeError: the process failed; its standard error is in the text.
    """
    files = {spec: cache / f"{_key(folder, spec, prompts, (steps, *zeroed))}.pt" for spec in specs}
    missing = {spec: str(file) for spec, file in files.items() if not file.exists()}
    if missing:
        cache.mkdir(parents=True, exist_ok=True)
        job = cache / f"job-{_digest(repr(sorted(missing.values())))}.pt"
        asked = [(p.text, [(picture.size, picture.tobytes()) for picture in p.pictures]) for p in prompts]
        torch.save(
            {"folder": str(folder), "missing": missing, "prompts": asked, "steps": steps, "zeroed": list(zeroed)}, job
        )
        done = subprocess.run([sys.executable, __file__, str(job)], capture_output=True, text=True)
        job.unlink()
        if done.returncode:
            raise RuntimeError(f"transformers failed on {folder.name} with {list(missing)}:\n{done.stderr[-4000:]}")
    return {spec: [Answer(**row) for row in torch.load(file)] for spec, file in files.items()}


def answer(
    model: Any, processor: Any, spec: str | None, prompt: Asked, steps: int, zeroed: Sequence[str] = ()
) -> Answer:
    """One prompt under one setting."""
    import vlmtok

    pictures = {"images": list(prompt.pictures)} if prompt.pictures else {}
    inputs = processor(text=prompt.text, return_tensors="pt", **pictures)
    length = inputs["input_ids"].shape[1]
    for name in zeroed:
        inputs[name] = torch.zeros_like(inputs[name])
    with vlmtok.compress(model, spec) if spec else contextlib.nullcontext(), _rows(model) as rows, torch.no_grad():
        made = model.generate(
            **inputs, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    return Answer(
        made.sequences[0, length:].tolist(),
        torch.stack(made.logits)[:, 0].float().log_softmax(-1),
        inputs["input_ids"][0].tolist(),
        rows[0],
    )


@contextlib.contextmanager
def _rows(model: Any) -> Iterator[list[int]]:
    """How many rows the first decoder layer gets, call by call."""
    rows: list[int] = []

    def see(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    handle = model.get_decoder().layers[0].register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


def _key(folder: Path, spec: str | None, prompts: Sequence[Asked], how: tuple[Any, ...]) -> str:
    pictures = [[(picture.size, _digest(picture.tobytes())) for picture in p.pictures] for p in prompts]
    files = [(path.name, _digest(path.read_bytes())) for path in sorted(folder.iterdir()) if path.is_file()]
    return _digest(repr((spec, [p.text for p in prompts], pictures, files, how, _versions())))


@once
def _versions() -> tuple[Any, ...]:
    import vlmtok

    root = Path(vlmtok.__file__).parents[1]
    sources = sorted(path for part in ("vlmtok", "adapters") for path in (root / part).rglob("*.py"))
    code = _digest(b"".join(path.read_bytes() for path in [*sources, Path(__file__)]))
    return (code, *(importlib.metadata.version(name) for name in ("torch", "transformers")))


def _digest(what: str | bytes) -> str:
    return hashlib.sha256(what.encode() if isinstance(what, str) else what).hexdigest()[:24]


def main() -> None:
    """Runs a job file."""
    import transformers

    job = torch.load(sys.argv[1])
    prompts = [
        Asked(text, tuple(Image.frombytes("RGB", size, data) for size, data in pictures))
        for text, pictures in job["prompts"]
    ]
    model = transformers.AutoModelForImageTextToText.from_pretrained(job["folder"]).float().eval()
    model.generation_config.eos_token_id = None  # all steps are wanted
    processor = transformers.AutoProcessor.from_pretrained(job["folder"])
    for spec, file in job["missing"].items():
        answers = [vars(answer(model, processor, spec, prompt, job["steps"], job["zeroed"])) for prompt in prompts]
        half = Path(file).with_suffix(".half")
        torch.save(answers, half)
        half.rename(file)


if __name__ == "__main__":
    main()
