"""The part of a card that a reader copies and runs."""

from __future__ import annotations

import json

from shapadapter.installing import how_to_install

from .escaping import one_line
from .facts import MATCHING, Facts


def usage(facts: Facts) -> str:
    """How to load the adapter, explain an image, and use it in a pipeline."""
    name = _literal(facts.name)
    revision = "" if facts.revision is None else f", revision={_literal(facts.revision)}"
    place = "" if facts.subfolder is None else f", subfolder={_literal(facts.subfolder)}"
    matching = facts.task == MATCHING
    parts = [
        "## Use",
        "```bash\n" + "\n".join(how_to_install()) + "\n```",
        f"```python\n{_explaining(name, place + revision, matching)}\n```",
    ]
    if not matching and facts.subfolder is None:  # pipeline() looks at the top only
        parts += [
            "As a pipeline:",
            "```python\n"
            "import shapadapter  # makes the task and the adapter known\n"
            "from transformers import pipeline\n\n"
            f'attribute = pipeline("image-attribution", model={name}{revision})\n'
            'attribute("photo.jpg")\n'
            "```",
        ]
    return "\n\n".join(parts)


def _explaining(name: str, where: str, matching: bool) -> str:
    texts = ', texts=["a cat", "a dog"]' if matching else ", top_k=3"
    return (
        "import shapadapter\n\n"
        f"model, processor = shapadapter.load({name}{where})\n"
        f'explanation = shapadapter.explain(model, "photo.jpg", processor{texts})\n\n'
        "print(explanation.top(3)[0])  # the likeliest, with logits\n"
        "print(explanation.attributions.shape)  # (images, rows, cols, shown classes)\n"
        'explanation.save_html("why.html")  # a page to look at'
    )


def _literal(value: str) -> str:
    """A Python string that stays on its line and inside its code block."""
    return json.dumps(one_line(value, 200), ensure_ascii=False)
