"""All measurements, in the order in which they run."""

from benches.rows import collective, divergence, steps, transfer

MEASUREMENTS = (
    *steps.MEASUREMENTS,
    *collective.MEASUREMENTS,
    *transfer.MEASUREMENTS,
    *divergence.MEASUREMENTS,
)
