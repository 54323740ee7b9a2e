"""What a manifest says of the weights that a test is about."""

from fips_ort.manifest import Manifest, WeightEntry

_OUTSIDE = ("attn", "attention", "embed_tokens", "lm_head", "reduction")
"""Parts of the names of packed weights outside the MLPs."""


def mlp_weights(manifest: Manifest) -> list[WeightEntry]:
    """The packed weights of the MLPs, their bases included."""
    return [weight for weight in manifest.weights if not any(part in weight.name for part in _OUTSIDE)]
