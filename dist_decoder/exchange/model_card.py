"""The README.md of an exported model."""

from __future__ import annotations

from collections.abc import Mapping

from dist_decoder.exchange.pretrained import PretrainedDocument
from dist_decoder.nn.decoder import Decoder


def model_card(
    document: PretrainedDocument,
    decoder: Decoder,
    licences: Mapping[str, str],
    citations: Mapping[str, str],
) -> str:
    """Return the card: what the model reads and gives, for whom, and under which terms."""
    gives = []
    if document.model.pooled:
        gives.append(f"pooled embedding ({document.encoder.pooled_dim},)")
    if document.model.tokens and document.encoder.token_shape:
        gives.append("tokens " + " x ".join(map(str, document.encoder.token_shape)))
    if document.model.low_level:
        gives.append("VAE latents 4 x 28 x 28")
    total = sum(parameter.numel() for parameter in decoder.parameters())
    lines = [
        "---",
        "library_name: dist-decoder",
        "tags: [fmri, brain-decoding]",
        "---",
        "",
        "# fMRI-to-image decoder",
        "",
        f"Reads the normalised responses of one subject and gives: {', '.join(gives)}.",
        f"Targets: encoder `{document.encoder.id}`. {total:,} parameters, {document.kind} "
        f"training, step {document.step}.",
        "",
        "```python",
        "from dist_decoder.exchange.pretrained import from_pretrained",
        "",
        "decoder = from_pretrained(FOLDER).decoder",
        "```",
        "",
        "| subject | voxels | mask |",
        "|---|---|---|",
    ]
    for name, info in document.subjects.items():
        lines.append(f"| {name} | {info.num_voxels} | {info.mask_fingerprint} |")
    lines += ["", "Another subject needs a layer of its own: `dist-decoder adapt`.", ""]
    lines += ["## Licences of the data", ""]
    lines += [f"- {name}: {text}" for name, text in licences.items()] or ["- none stated"]
    if citations:
        lines += ["", "## Please cite", "", *(f"- {n}: {text}" for n, text in citations.items())]
    return "\n".join(lines) + "\n"
