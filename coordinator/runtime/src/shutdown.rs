//! Signals: the first SIGINT or SIGTERM drains, the second exits.

use tokio::signal::unix::{SignalKind, signal as listen};
use tokio_util::sync::CancellationToken;

/// Starts to listen, and returns a token that is cancelled by the first SIGINT or SIGTERM. The second ends the process at
/// once, with 128 plus the signal's number. Call it once, inside a runtime.
///
/// # Errors
/// The operating system refuses a signal handler.
pub fn signal() -> std::io::Result<CancellationToken> {
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut terminate = listen(SignalKind::terminate())?;
    let token = CancellationToken::new();
    let drain = token.clone();
    // Not among `Tasks`: it must outlive the drain that joins them, to hear the second signal.
    tokio::spawn(async move {
        for first in [true, false] {
            let number = tokio::select! {
                _ = interrupt.recv() => SignalKind::interrupt().as_raw_value(),
                _ = terminate.recv() => SignalKind::terminate().as_raw_value(),
            };
            if first {
                tracing::info!(signal = number, "draining; a second signal exits at once");
                drain.cancel();
            } else {
                tracing::warn!(signal = number, "exiting without draining");
                std::process::exit(128 + number);
            }
        }
    });
    Ok(token)
}
