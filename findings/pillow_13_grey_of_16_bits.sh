#!/usr/bin/env bash
# Pillow 13.0.0: the same picture in PNGs of 16 bits comes out as two different ones. Of grey without alpha, convert("L") and
# convert("RGB") clip every value at 255, so that nearly all of it is white; of grey with alpha and of colour, the upper 8 bits
# are kept, as libpng's png_set_strip_16 does. One would have guessed that a picture keeps its brightness whether or not it has
# an alpha channel. Detectron2's read_image converts in this way.
#
# Output seen (a ramp of 0, 16, ... 240, times 257, converted to 8 bits):
#   Pillow 13.0.0
#   grey           opened as I;16: 0 255 255 255 255 255 255 255 255 255 255 255 255 255 255 255
#   grey and alpha opened as RGBA: 0 16 32 48 64 80 96 112 128 144 160 176 192 208 224 240
#   colour         opened as RGB: 0 16 32 48 64 80 96 112 128 144 160 176 192 208 224 240
#
# Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet pillow==13.0.0 pypng==0.20220715.0
"$folder/venv/bin/python" - <<'PY'
import io

import PIL
import png
from PIL import Image

print("Pillow", PIL.__version__)
ramp = list(range(0, 256, 16))
wide = [257 * value for value in ramp]


def eight_bits(name, pixel, **kind):
    """The ramp as Pillow reads it back of a PNG of 16 bits."""
    file = io.BytesIO()
    row = [value for grey in wide for value in pixel(grey)]
    png.Writer(width=len(wide), height=1, bitdepth=16, **kind).write(file, [row])
    image = Image.open(file)
    found = list(image.convert("RGB").getchannel(0).tobytes())
    print(f"{name:14} opened as {image.mode}:", *found)
    assert list(image.convert("L").tobytes()) == found
    return found


assert eight_bits("grey", lambda v: [v], greyscale=True) == [0] + [255] * 15
assert eight_bits("grey and alpha", lambda v: [v, 65535], greyscale=True, alpha=True) == ramp
assert eight_bits("colour", lambda v: [v] * 3, greyscale=False) == ramp
PY
