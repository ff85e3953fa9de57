"""All measurements, in the order in which they run."""

from benches.rows import divergence, steps

MEASUREMENTS = (*steps.MEASUREMENTS, *divergence.MEASUREMENTS)
