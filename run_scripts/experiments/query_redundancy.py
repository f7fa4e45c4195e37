"""Do a Q-Former's queries say different things of a picture? Of the embedded world's validation pictures.

    python run_scripts/experiments/query_redundancy.py --models output/stage1/0 output/pretrain_stage2 random

From each query's output its mean over pictures is taken, which leaves what the query says of a picture. Printed of
that: the mean cosine between two queries of the same picture (1: they all say the same), and the effective rank over
pictures of all queries together, exp of the entropy of the squared singular values' shares (Roy and Vetterli, 2007).
"random" is the Q-Former as it is drawn. `--out` gets a json file with the command, the commit and the machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from seeds import surroundings
from torch import Tensor, nn
from torch.nn.functional import normalize

from lavis_lite.api import load_dataset, load_model, load_preprocess
from lavis_lite.common.model_recipe import model_recipe

RANDOM = "random"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["output/pretrain_stage1", RANDOM])
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    vision, _ = load_preprocess(model_recipe("blip2/shapes").preprocess)
    dataset = load_dataset("shapes_caption", data_type="val")
    pictures = torch.stack([vision["eval"](dataset.image(row)) for row in range(args.pictures)])
    results = {}
    for name in args.models:
        torch.manual_seed(0)
        model = load_model("blip2/shapes" if name == RANDOM else name, is_eval=True)
        results[name] = redundancy(outputs(model, pictures))
        print("{}: cosine {cosine:.3f}, effective rank {effective_rank:.1f}".format(name, **results[name]))
    if args.out:
        facts = {"command": " ".join(sys.argv), **surroundings(), "models": results}
        args.out.write_text(json.dumps(facts, indent=1) + "\n")


@torch.no_grad()
def outputs(model: nn.Module, pictures: Tensor) -> Tensor:
    """What the queries make of pictures [B, 3, H, W]: [B, Q, D]."""
    states: Tensor = model.Qformer.encode_queries(model.query_tokens, model.encode_image(pictures)).output
    return states


def redundancy(states: Tensor) -> dict[str, float]:
    """Mean cosine between queries [B, Q, D] of a picture, and effective rank over pictures, see above."""
    said = states - states.mean(0)
    directions = normalize(said, dim=-1)
    queries = states.shape[1]
    cosines = (directions @ directions.transpose(1, 2)).sum((1, 2))
    shares = torch.linalg.svdvals(said.flatten(1)).square()
    shares = shares / shares.sum()
    entropy = -torch.special.xlogy(shares, shares).sum()
    return {
        "cosine": float(((cosines - queries) / (queries * (queries - 1))).mean()),
        "effective_rank": float(entropy.exp()),
    }


if __name__ == "__main__":
    main()
