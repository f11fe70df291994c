"""The model that lmms-eval runs: a checkpoint of transformers under a method, or bare."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from loguru import logger
from tqdm import tqdm

from ..compression import Compression, compress
from ..errors import ParameterError, PassError, UnsupportedModel, VlmtokError
from ..lab.clock import Clock
from ..loading import load
from .arguments import Arguments, split
from .bounds import bounded
from .ending import ending
from .figures import Figures
from .generation import READ, cut, length, settings_for, stops

BOOKS = "random:keep=1.0"
"""What counts tokens of a bare model: it keeps all of them, and leaves every bit."""


class Vlmtok(lmms):
    """A vision-language model under a method, for lmms-eval's chat tasks.

    It stands on lmms-eval's interface, not on its class ``Huggingface``: that of release 0.7.3 loads models without
    their heads under transformers 5.24, in bfloat16 on every device, asks the first document of a batch how all of them
    are put, pads on the side that the tokenizer happens to have, and begins some prompts with two begin-of-sequence
    tokens.

    Args:
        given: see `Arguments`.

    Raises:
        VlmtokError: the arguments, the method or the checkpoint cannot be run; before any request is answered.
    """

    is_simple = False

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.arguments = asked = Arguments.read(given)
        asked.check()
        loaded = load(
            asked.pretrained,
            device=_own_gpu(asked.device),
            dtype=asked.dtype,
            attn_implementation=asked.attn_implementation,
        )
        if not loaded.language:
            raise UnsupportedModel(f"{asked.pretrained!r} is a vision tower; lmms-eval asks for answers in words")
        self.processor = loaded.processor
        if not getattr(self.processor, "chat_template", None):
            raise UnsupportedModel(
                f"the processor of {asked.pretrained!r} has no chat template, which prompts are made by"
            )
        self.processor.tokenizer.padding_side = "left"  # what is generated stands behind the prompt in every row
        self._sizes = bounded(asked, self.processor)
        self._model: Any = loaded.model  # lmms-eval gives its memory back behind the last request
        self.device, self.dtype = loaded.device, loaded.dtype
        self.batch_size = asked.batch_size
        self.run = self._attached()
        self._told: set[str] = set()

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Vlmtok:
        """Makes the model that ``--model_args`` asks for; what cannot be ends lmms-eval's command, with 1."""
        with ending():
            beside = {name: value for name, value in (additional_config or {}).items() if value is not None}
            return cls(**{**beside, **split(arg_string)})

    def _attached(self) -> Compression | None:
        """The method on the model; of a bare one what keeps the books, where that can be."""
        if not self.arguments.bare:
            return compress(self._model, self.arguments.method)
        if not self.arguments.figures:
            return None
        try:
            return compress(self._model, BOOKS)
        except VlmtokError as problem:
            logger.warning(f"vlmtok: the bare model runs without figures: {problem}")
            return None

    def clean(self) -> None:
        """Takes the hooks off and gives the memory back."""
        if self.run is not None:
            self.run._end(
                quiet=True
            )  # responses may all have come from a cache; one that looks on is refused elsewhere
        super().clean()

    # ------------------------------------------------------------------ what lmms-eval asks
    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers all requests, or raises; an empty answer is one that the model ended at once.

        Args:
            requests: of chat tasks, with pictures and earlier turns as their messages say.

        Returns:
            Answers with their lengths, in the order of the requests.

        Raises:
            VlmtokError: a request cannot be answered under the method.
        """
        with ending():
            return self._answers(requests)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refuses: the model answers in words."""
        with ending():
            raise ParameterError("vlmtok answers in words; tasks that compare likelihoods cannot be run")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuses: earlier turns may stand in a document's messages."""
        with ending():
            raise ParameterError("vlmtok answers one turn; tasks that ask on after its answer cannot be run")

    # ------------------------------------------------------------------ answering
    def _answers(self, requests: list[Instance]) -> list[GenerationResult]:
        found: dict[int, GenerationResult] = {}
        figures: dict[str, Figures] = defaultdict(Figures)
        new_tokens = 0
        clock = Clock()
        watched = nullcontext() if self.run is None or self.arguments.bare else clock.watching(self.run)
        bar = tqdm(total=len(requests), disable=self.rank != 0, desc=f"vlmtok, {self.arguments.method}")
        with watched, bar:
            for places in batches(requests, self.batch_size):
                batch = [requests[place] for place in places]
                answers = self._batch(batch, figures[batch[0].args[4]], clock)
                found.update(zip(places, answers, strict=True))
                new_tokens += sum(answer.token_counts.output_tokens for answer in answers)
                bar.update(len(batch))
        self._log(figures, new_tokens)
        return [found[place] for place in range(len(requests))]

    def _batch(self, batch: Sequence[Instance], figures: Figures, clock: Clock) -> list[GenerationResult]:
        """Answers requests of one task under its settings."""
        asked = batch[0].args[2]
        self._say_once(
            *(f"{name}={value!r} of the task is not used" for name, value in asked.items() if name not in READ)
        )
        inputs, pictures = self._inputs(batch)
        before, began = clock.seconds, time.perf_counter()
        output = self._model.generate(**inputs, **settings_for(asked))
        rows = output.tolist()  # waits for a GPU
        seconds = time.perf_counter() - began
        prompt = 0 if self._model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        new = [row[prompt:] for row in rows]
        if len(new) != len(batch) or not all(new):
            raise PassError(
                f"generate gave {len(new)} answers to {len(batch)} requests, of {[len(r) for r in new]} tokens"
            )
        lengths = [length(row, self._ends(), self.processor.tokenizer.pad_token_id) for row in new]
        figures.answered(len(batch), sum(not speaks for _, speaks in lengths), seconds, clock.seconds - before)
        if self.run is not None and pictures:
            self._keep_books(self.run, figures, len(batch))
        texts = self.processor.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        masks = inputs["attention_mask"].sum(1).tolist()
        return [
            GenerationResult(cut(text, stops(asked)), TokenCounts(input_tokens=before, output_tokens=count))
            for text, before, (count, _) in zip(texts, masks, lengths, strict=True)
        ]

    def _keep_books(self, run: Compression, figures: Figures, requests: int) -> None:
        """Adds what the last batch cost, and refuses a method that looked on: it would score as if it were harmless."""
        report = run.report()
        if report.problem is not None and not self.arguments.bare:
            raise PassError(f"{self.arguments.method} did nothing to a prompt with pictures: {report.problem}")
        self._say_once(*(f"{self.arguments.method}: {note}" for note in report.notes if not self.arguments.bare))
        if self.arguments.figures:
            figures.cost(report, requests)

    def _inputs(self, batch: Sequence[Instance]) -> tuple[dict[str, Any], int]:
        """What ``generate`` takes, rows padded on the left, and how many pictures are in it."""
        conversations, pictures = [], 0
        for request in batch:
            _, messages_of, _, number, task, split = request.args
            messages = messages_of(self.task_dict[task][split][number])
            if self.arguments.system_prompt:
                messages = self._apply_system_prompt(
                    messages, self._resolve_system_prompt(self.arguments.system_prompt)
                )
            chat = ChatMessages(messages=messages)
            images, clips, sounds = chat.extract_media()
            if clips or sounds:
                raise ParameterError(
                    f"task {task!r} shows clips or sounds; vlmtok's model for lmms-eval takes pictures"
                )
            conversations.append(chat.to_hf_messages())
            pictures += len(images)
        made = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={
                "padding": True,
                **({"images_kwargs": {"size": self._sizes}} if pictures and self._sizes else {}),
            },
        )
        return dict(made.to(self.device, self.dtype)), pictures

    def _ends(self) -> set[int]:
        """Ids that end a sequence, of the model's own configuration of generation and of the tokenizer."""
        own = self._model.generation_config.eos_token_id
        named = [self.processor.tokenizer.eos_token_id, *(own if isinstance(own, (list, tuple)) else [own])]
        return {int(one) for one in named if one is not None}

    # ------------------------------------------------------------------ what it tells
    def _log(self, figures: dict[str, Figures], new_tokens: int) -> None:
        """Hands the figures to lmms-eval, which writes them into its results below ``throughput``."""
        whole = Figures()
        for one in figures.values():
            whole.add(one)
        made = whole.metrics()
        if len(figures) > 1:
            made |= {f"{task}_{name}": value for task, one in figures.items() for name, value in one.metrics().items()}
        speed = new_tokens / whole.seconds if whole.seconds else 0.0
        log_metrics(whole.seconds, new_tokens, speed, additional_metrics=made)

    def _say_once(self, *words: str) -> None:
        for one in words:
            if one not in self._told:
                self._told.add(one)
                logger.info(f"vlmtok: {one}")


def batches(requests: Sequence[Instance], size: int) -> Iterator[list[int]]:
    """Places of requests that run at once: of one task, under one set of settings, in their order.

    Args:
        requests: of all tasks.
        size: how many at most.
    """
    alike: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for place, request in enumerate(requests):
        _, _, asked, _, task, split = request.args
        alike[task, split, json.dumps(asked, sort_keys=True, default=str)].append(place)
    for places in alike.values():
        for first in range(0, len(places), size):
            yield places[first : first + size]


def _own_gpu(device: str) -> str:
    """The GPU of this process, where several run and none is named."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return device
