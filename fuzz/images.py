#!/usr/bin/env python3
"""Writes the seeds of the target `image`: one small file of every kind that the decoders know.

    python3 fuzz/images.py        (needs Pillow)
"""
import pathlib

from PIL import Image

OUT = pathlib.Path(__file__).resolve().parent.parent / "tests/fixtures/fuzz/image"


def picture(mode, side=19):
    image = Image.new("RGB", (side, side - 6))
    image.putdata([(9 * x % 256, 7 * y % 256, x * y % 256) for y in range(side - 6) for x in range(side)])
    return image.convert(mode)


def main():
    OUT.mkdir(parents=True, exist_ok=True)

    def save(name, image, **options):
        image.save(OUT / name, **options)

    for mode in ["L", "RGB", "CMYK"]:
        save(f"{mode.lower()}.jpg", picture(mode), quality=80)
        save(f"{mode.lower()}-progressive.jpg", picture(mode), quality=80, progressive=True)
    for sampling in [0, 1, 2]:
        save(f"sampling{sampling}.jpg", picture("RGB"), quality=90, subsampling=sampling, optimize=True)
    save("restart.jpg", picture("RGB", 33), quality=50, restart_marker_blocks=2)
    for mode in ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"]:
        image = picture("L").convert("I;16") if mode == "I;16" else picture(mode if mode != "LA" else "RGBA")
        save(f"{mode.lower().replace(';', '')}.png", image.convert(mode))
    palette = picture("P")
    palette.info["transparency"] = 3
    save("transparent.png", palette)
    save("lossy.webp", picture("RGB"), quality=60)
    save("lossless.webp", picture("RGB"), lossless=True)
    save("alpha.webp", picture("RGBA"), quality=60)
    save("animated.webp", picture("RGB"), save_all=True, append_images=[picture("L").convert("RGB")], quality=40)


if __name__ == "__main__":
    main()
