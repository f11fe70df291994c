"""A task of lmms-eval that needs no download: the pictures that ship with vlmtok, for trying an installation.

``python -m vlmtok.harness.pictures FOLDER``, then ``lmms-eval eval --include_path FOLDER --tasks vlmtok_pictures ...``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ..loading import LoadError, samples

TASK = "vlmtok_pictures"

_YAML = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function shown.pictures
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 8
  temperature: 0
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 1
"""

_SHOWN = '''\
"""Pictures of a document."""

from PIL import Image


def pictures(doc):
    return [Image.open(doc["picture"]).convert("RGB")]
'''


def write(folder: Path) -> Path:
    """Writes the task.

    Args:
        folder: where; it is made if need be.

    Returns:
        The file that lmms-eval reads.

    Raises:
        LoadError: the folder cannot be written, or the pictures are missing.
    """
    rows = [{"picture": str(one.path), "question": one.question, "answer": one.answer} for one in samples()]
    data, task = folder.resolve() / "questions.jsonl", folder / f"{TASK}.yaml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        (folder / "shown.py").write_text(_SHOWN, "utf-8")
        task.write_text(_YAML.format(task=TASK, data=json.dumps(str(data))), "utf-8")
    except OSError as problem:
        raise LoadError(f"cannot write the task into {str(folder)!r}: {problem.strerror}") from None
    return task


def main(words: list[str]) -> int:
    """The command: writes the task into the folder that it is given."""
    if len(words) != 1 or words[0].startswith("-"):
        print(__doc__)
        return 0 if words in (["-h"], ["--help"]) else 2
    try:
        print(write(Path(words[0])))
    except LoadError as problem:
        print(f"vlmtok: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
