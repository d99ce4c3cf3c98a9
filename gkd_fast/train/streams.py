"""Random numbers of a run's data, as functions of (seed, purpose, epoch, image)."""

import numpy as np

# What a stream is for; with the seed it makes the key of a counter-based generator.
ORDER, AUGMENTATION, NOISE, FIXED_NOISE = range(4)


class Stream:
    """Random numbers that can be entered at any (epoch, image): a counter-based generator, Philox."""

    def __init__(self, seed: int, purpose: int):
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        self._generator = np.random.Generator(np.random.Philox(key=[seed, purpose]))
        self._start = self._generator.bit_generator.state

    def at(self, epoch: int, image: int = 0) -> np.random.Generator:
        # Setting the state is six times faster than making a generator. The low half of the counter is the position
        # within one image's numbers.
        self._start["state"]["counter"] = np.array([0, 0, image, epoch], dtype=np.uint64)
        self._generator.bit_generator.state = self._start
        return self._generator
