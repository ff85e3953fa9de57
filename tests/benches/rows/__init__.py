"""All measurements, in the order in which they run."""

from benches.rows import bf16, cache, checkpoint, collective, divergence, gradual, interpreter, plan, rollback, steps, transfer

MEASUREMENTS = (
    *steps.MEASUREMENTS,
    *bf16.MEASUREMENTS,
    *interpreter.MEASUREMENTS,
    *cache.MEASUREMENTS,
    *gradual.MEASUREMENTS,
    *plan.MEASUREMENTS,
    *checkpoint.MEASUREMENTS,
    *rollback.MEASUREMENTS,
    *collective.MEASUREMENTS,
    *transfer.MEASUREMENTS,
    *divergence.MEASUREMENTS,
)
