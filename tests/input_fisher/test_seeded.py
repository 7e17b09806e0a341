"""The random numbers of an example are those of a new generator with its key and counter."""

import numpy as np
from npeff.input_fisher.seeded import SeededNumbers


def test_the_numbers_of_an_example_depend_on_nothing_that_was_drawn_before():
    numbers = SeededNumbers(2**63, "replacement")
    for example, draw in ((5, 0), (2**40, 3), (5, 2**32), (5, 0)):
        bits = np.random.Philox(key=np.array([2**63, example], np.uint64), counter=[0, 0, draw, 2])
        expected, found = np.random.Generator(bits), numbers.at(example, draw)
        # numbers of 32 bits leave the other half of a word behind
        assert np.array_equal(found.integers(7, size=3, dtype=np.int32), expected.integers(7, size=3, dtype=np.int32))
        assert np.array_equal(found.standard_normal(9), expected.standard_normal(9))
    assert numbers.at(0).random() != SeededNumbers(2**63, "ties").at(0).random()
