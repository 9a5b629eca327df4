"""Writes the model card of an adapter for the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from llama_adapter.methods.config import AdapterConfig

_TEXT = """---
{data}
---

# {name}

A [LLaMA-Adapter](https://arxiv.org/abs/2303.16199) for `{base}`, trained by method
`{method}` in the top {layers} layers{extras}. This repository holds only the adapter.

```python
from llama_adapter import LlamaAdapter

model = LlamaAdapter.from_pretrained("{repo_id}")
print(model.chat("{question}"{image}))
```

`chat` writes questions in the text format `{template}`, as in training.
"""


def write_card(folder: Path, config: AdapterConfig, repo_id: str, *, tags: Sequence[str] = ()) -> None:
    """Write README.md for an adapter: its base, what it is, and how to load it.

    Args:
        repo_id: owner/name of the adapter on the hub.
        tags: tags beside those that every card has.
    """
    sees = config.vision is not None
    data = ModelCardData(
        base_model=config.base if config.base.count("/") == 1 else None,  # the hub accepts only its own ids
        library_name="llama-adapter",
        pipeline_tag="image-text-to-text" if sees else "text-generation",
        tags=list(dict.fromkeys(["llama-adapter", *tags])),
    )
    extras = [f"a projection of the features of `{config.vision.tower}`"] if config.vision else []
    text = _TEXT.format(
        data=data.to_yaml(),
        name=repo_id.rpartition("/")[2],
        base=config.base,
        method=config.method,
        layers=config.adapted_layers,
        extras="".join(f", and {extra}" for extra in extras),
        repo_id=repo_id,
        question="What is in the picture?" if sees else "Give three tips for staying healthy.",
        image=', image="photo.jpg"' if sees else "",
        template=config.template,
    )
    ModelCard(text).save(folder / "README.md")
