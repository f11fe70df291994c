"""What vLLM answers with the plug-in, run in a process of its own: one engine a process is what vLLM is made for.

`run(folder, rounds)` starts an engine on a checkpoint, gives it each round of requests as one batch, and brings back
what it said, errors included.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

ARGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 1024,
    "enforce_eager": True,
    "block_size": 32,
    "max_logprobs": -1,
    "seed": 0,
}


@dataclass(frozen=True)
class Request:
    """A request.

    Attributes:
        text: with a mark for each picture, as a processor takes it.
        pictures: RGB.
        spec: of this request; None leaves it to the engine.
        uuids: of the user's own for the pictures, or empty.
    """

    text: str
    pictures: tuple[Image.Image, ...] = ()
    spec: str | None = None
    uuids: tuple[str, ...] = ()


@dataclass
class Reply:
    """What came back.

    Attributes:
        ids: greedy choices.
        logprobs: of the whole vocabulary, a list for each step.
        prompt: ids of the prompt as the engine laid it out.
        cached: tokens of it that a cache held.
        error: class and text of what was raised, or empty.
        model: class of the model that answered.
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    cached: int = 0
    error: str = ""
    model: str = ""


def run(
    folder: Path | str,
    rounds: Sequence[Sequence[Request]],
    spec: str | None = None,
    plugin: bool = True,
    env: dict[str, str] | None = None,
    before: str = "",
    steps: int = 6,
    timeout: float = 600,
    **args: Any,
) -> list[list[Reply]]:
    """Answers of an engine.

    Args:
        folder: of the checkpoint.
        rounds: requests; those of a round are one batch.
        spec: of the engine.
        plugin: whether the plug-in is chosen, else it is vLLM alone.
        env: of the process, over the caller's (see cpu.env).
        before: Python that runs before the engine starts, for controls that break something.
        steps: tokens of an answer.
        timeout: seconds after which a hung engine fails.
        args: of `vllm.LLM`, over `ARGS`.

    Raises:
        RuntimeError: the process failed; its standard error is in the text.
        subprocess.TimeoutExpired: it hung.
    """
    with tempfile.TemporaryDirectory() as place:
        job, done = Path(place, "job"), Path(place, "done")
        job.write_bytes(pickle.dumps((str(folder), rounds, spec, plugin, before, steps, {**ARGS, **args})))
        process = subprocess.run(
            [sys.executable, __file__, str(job), str(done)],
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if not done.exists():
            raise RuntimeError(
                f"vLLM failed on {Path(folder).name}:\n{process.stdout[-2000:]}\n{process.stderr[-6000:]}"
            )
        replies: list[list[Reply]] = pickle.loads(done.read_bytes())
        return replies


def main() -> None:
    """Runs a job file."""
    folder, rounds, spec, plugin, before, steps, args = pickle.loads(Path(sys.argv[1]).read_bytes())
    exec(before, {})
    from vllm import LLM, SamplingParams

    if plugin:
        import vlmtok_vllm

        args.update(vlmtok_vllm.engine_args(spec))
    engine = LLM(model=folder, **args)
    name = engine.collective_rpc(_model_name)[0]
    how = SamplingParams(max_tokens=steps, temperature=0, ignore_eos=True, logprobs=-1, detokenize=False)
    replies = [_round(engine, requests, how, name) for requests in rounds]
    Path(sys.argv[2]).write_bytes(pickle.dumps(replies))


def _model_name(worker: Any) -> str:
    runner = getattr(worker, "model_runner", None) or worker.worker.model_runner
    return type(runner.model).__name__


def _round(engine: Any, requests: Sequence[Request], how: Any, name: str) -> list[Reply]:
    try:
        made = engine.generate([_given(one) for one in requests], how, use_tqdm=False)
    except Exception as problem:
        return [Reply(error=f"{type(problem).__name__}: {problem}", model=name) for _ in requests]
    replies = []
    for one in made:
        best = one.outputs[0]
        logprobs = [[step[i].logprob for i in range(len(step))] for step in best.logprobs or []]
        replies.append(
            Reply(list(best.token_ids), logprobs, list(one.prompt_token_ids), one.num_cached_tokens or 0, "", name)
        )
    return replies


def _given(request: Request) -> dict[str, Any]:
    given: dict[str, Any] = {"prompt": request.text}
    if request.pictures:
        given["multi_modal_data"] = {"image": list(request.pictures)}
    if request.spec is not None:
        given["mm_processor_kwargs"] = {"vlmtok": request.spec}
    if request.uuids:
        given["multi_modal_uuids"] = {"image": list(request.uuids)}
    return given


if __name__ == "__main__":
    import engine_side  # not as __main__, which pickles of the parent's classes do not name

    engine_side.main()
