"""All measurements, in the order in which they run."""

from benches.rows import steps

MEASUREMENTS = (*steps.MEASUREMENTS,)
