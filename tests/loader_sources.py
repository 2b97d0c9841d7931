"""Sources that say what was read of them."""

import numpy as np

from dataset import Source


class Numbered(Source):
    """Sample i: a picture whose first pixels spell i; counts what is read."""

    def __init__(self, count, size=8):
        self.keys, self.size, self.num_classes = np.arange(count) + 1000, size, 7
        self.seen = []

    def fetch(self, i):
        self.seen.append(i)
        image = np.full((self.size, self.size, 3), 9, np.uint8)
        image[:, 0] = image[:, -1] = (i % 256, i // 256, 200)
        image[0, 1] = 77
        return image, i % 7


class Broken(Numbered):
    def fetch(self, i):
        if i == 13:
            raise LookupError("sample thirteen is cursed")
        return super().fetch(i)
