"""Pictures of all corruptions, made from the embedded images when the pages are built."""

import io

import torch
from PIL import Image

from testtime._core.seeds import generator
from testtime.streams.corruptions import (
    CORRUPTIONS,
    EXTRA_CORRUPTIONS,
    GEOMETRIC,
    ILLUMINATION,
    SEVERITIES,
    corrupt,
)
from testtime.streams.data import load_data

GROUPS = {
    "The fifteen of ImageNet-C": CORRUPTIONS,
    "Its four extra ones": EXTRA_CORRUPTIONS,
    "Position": GEOMETRIC,
    "Light": ILLUMINATION,
}
SAMPLE, ZOOM, GAP = 10, 2, 2


def strips() -> dict[str, bytes]:
    """Path -> PNG: one image, clean and at severity 1 to 5."""
    image = load_data("fashion-mnist:sample")[SAMPLE][0][None]
    made = {}
    for name in (name for names in GROUPS.values() for name in names):
        row = [image] + [
            corrupt(image, name, severity, generator=generator(0, name)) for severity in SEVERITIES
        ]
        grey = torch.cat([torch.nn.functional.pad(one, (0, GAP)) for one in row], -1)[0, 0]
        pixels = (grey * 255).round().to(torch.uint8).numpy()
        picture = Image.fromarray(pixels)
        picture = picture.resize(
            (picture.width * ZOOM, picture.height * ZOOM), Image.Resampling.NEAREST
        )
        file = io.BytesIO()
        picture.save(file, "PNG", optimize=True)
        made[f"images/{name}.png"] = file.getvalue()
    return made


def sheet() -> str:
    """The contact sheet as HTML."""
    blocks = []
    for title, names in GROUPS.items():
        figures = "".join(
            f'<figure><img src="../images/{name}.png" loading="lazy" alt="{name}: clean, then severity '
            f'1 to 5"><figcaption><code>{name}</code></figcaption></figure>'
            for name in names
        )
        blocks.append(f'### {title}\n\n<div class="strips">{figures}</div>\n')
    return "\n".join(blocks)
