"""Time of classifier-free guidance when drawing the codes of images, in one run on the same model.

    python tests/benchmarks/token_guidance.py [--rounds 7] [--threads 1]

256 codes of 4 images, 6 layers of width 256. Guided drawing beside (a) the same doubled batch unguided, (b) half
that batch, unguided, and (c) transformers' UnbatchedClassifierFreeGuidanceLogitsProcessor, which makes a second
pass for each code, with a cache of its own. Greedy, so that all draw as many codes, and (c) the same ones.

Writes tests/benchmarks/results/token_guidance.json.
"""

from __future__ import annotations

from pathlib import Path

import torch
from timing import Comparison, compare, parser
from transformers import LogitsProcessorList, UnbatchedClassifierFreeGuidanceLogitsProcessor

from hf_dpssl.generation.pipeline_vq_token import CodeSampler, make_language_model
from hf_dpssl.runs.results import write_results

RESULTS = Path(__file__).parent / "results" / "token_guidance.json"
CODES, CLASSES, TOKENS, IMAGES, SCALE = 1024, 10, 256, 4, 2.0
SIZE = dict(num_layers=6, width=256, num_heads=4)


def comparisons() -> list[Comparison]:
    """Guided drawing beside its alternatives; each returns a number that depends on all codes drawn."""
    torch.manual_seed(0)
    sizes = dict(num_codes=CODES, num_classes=CLASSES, num_tokens=TOKENS)
    model = make_language_model("gpt2", **SIZE, **sizes).eval()
    with_class = torch.arange(IMAGES)[:, None] + CODES
    without = torch.full_like(with_class, CODES + CLASSES)
    doubled = torch.cat([with_class, without])

    @torch.no_grad()
    def draw(prompt, processor) -> float:
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            logits_processor=LogitsProcessorList([processor]),
            max_new_tokens=TOKENS,
            do_sample=False,
        )
        return float((tokens[:IMAGES, 1:] * torch.arange(1, TOKENS + 1)).double().sum())

    def guided() -> float:
        return draw(doubled, CodeSampler(CODES, guidance_scale=SCALE, temperature=0.0))

    def peer() -> float:
        processor = UnbatchedClassifierFreeGuidanceLogitsProcessor(SCALE, model, unconditional_ids=without)
        return draw(with_class, processor)

    def sampled() -> float:
        draw(doubled, CodeSampler(CODES, torch.Generator().manual_seed(0), SCALE, 0.9, 100, 0.95))
        return 0.0

    def unguided(prompt) -> float:
        return draw(prompt, CodeSampler(CODES, temperature=0.0))

    name = f"{TOKENS} codes x {IMAGES}, guided"
    return [
        Comparison(name, "the doubled batch without guidance", guided, lambda: unguided(doubled), aim=1.3),
        Comparison(f"{name}, top-k, top-p", "the doubled batch without guidance", sampled, lambda: unguided(doubled)),
        Comparison(name, "half the batch without guidance", guided, lambda: unguided(with_class)),
        Comparison(name, "transformers' unbatched guidance", guided, peer, same_value=True),
    ]


def main() -> None:
    """Run all comparisons and write the JSON."""
    args = parser(__doc__, 7).parse_args()
    torch.set_num_threads(args.threads)
    measured = compare(comparisons(), args.rounds)
    RESULTS.parent.mkdir(exist_ok=True)
    samples = {"rounds": args.rounds, "images": IMAGES, "codes": TOKENS, "codebook": CODES, **SIZE}
    write_results(RESULTS, {"comparisons": measured}, dataset="untrained model", seed=0, samples=samples)


if __name__ == "__main__":
    main()
