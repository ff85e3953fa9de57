//! What the operating system lets this process have.

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::io;

/// Lets this process open as many files and connections as it may, which is often far more than it is given at first. Returns how many.
///
/// # Errors
/// The operating system does not say, or refuses.
pub fn raise_open_files() -> io::Result<u64> {
    let (given, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if given < most {
        setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    }
    Ok(most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_is_allowed_is_given() {
        let most = raise_open_files().unwrap();
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (most, most));
        assert_eq!(raise_open_files().unwrap(), most, "again");
    }
}
