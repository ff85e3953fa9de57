"""scikit-learn's handwritten digits as folders of png files, one folder per class.

Usage: digits.py FOLDER

Writes FOLDER/low/<digit> (0-4, all samples), FOLDER/high-train/<digit> (5-9, few samples) and FOLDER/high-test/<digit>
(5-9, the rest).
"""

import shutil
import sys
from pathlib import Path

import numpy
from PIL import Image
from sklearn.datasets import load_digits

FEW = 5
PIXELS = 32


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    for name in ("low", "high-train", "high-test"):
        shutil.rmtree(folder / name, ignore_errors=True)
    images, labels = load_digits(return_X_y=True)
    seen = dict.fromkeys(range(10), 0)
    for number, (pixels, label) in enumerate(zip(images, labels)):
        seen[label] += 1
        part = "low" if label < 5 else "high-train" if seen[label] <= FEW else "high-test"
        path = folder / part / str(label) / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        # 8x8 values 0-16.
        grey = Image.fromarray((pixels.reshape(8, 8) * 255 / 16).astype(numpy.uint8))
        grey.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC).save(path)


if __name__ == "__main__":
    main()
