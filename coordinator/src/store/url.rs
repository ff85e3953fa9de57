//! The store's address as users write it.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// `embedded:PATH`, or `etcd://HOST:PORT[,HOST:PORT..][/PREFIX]`; `etcd+tls://` where etcd speaks TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreUrl {
    /// One file on this machine, for one coordinator.
    Embedded(PathBuf),
    Etcd {
        /// `host:port`, at least one.
        endpoints: Vec<String>,
        /// Put before every key; ends with a slash.
        prefix: String,
        tls: bool,
    },
}

#[derive(Debug, thiserror::Error)]
#[error(
    "store {text:?}: {what}; write embedded:PATH, or etcd://HOST:PORT[,HOST:PORT..][/PREFIX], or the same with etcd+tls"
)]
pub struct ParseError {
    text: String,
    what: &'static str,
}

impl FromStr for StoreUrl {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let refuse = |what| ParseError { text: text.to_owned(), what };
        if let Some(path) = text.strip_prefix("embedded:") {
            if path.is_empty() {
                return Err(refuse("the path is missing"));
            }
            return Ok(Self::Embedded(PathBuf::from(path)));
        }
        let (rest, tls) = match (text.strip_prefix("etcd://"), text.strip_prefix("etcd+tls://")) {
            (Some(rest), _) => (rest, false),
            (None, Some(rest)) => (rest, true),
            (None, None) => return Err(refuse("neither embedded: nor etcd:// nor etcd+tls://")),
        };
        let (hosts, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let endpoints: Vec<String> = hosts.split(',').map(str::to_owned).collect();
        for endpoint in &endpoints {
            // It would be in every log line that names the store.
            if endpoint.contains('@') {
                return Err(refuse("a user belongs into --etcd-user, and a password into a file"));
            }
            match endpoint.rsplit_once(':') {
                Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => {}
                Some(_) | None => return Err(refuse("an endpoint is not HOST:PORT")),
            }
        }
        let prefix = match prefix.trim_matches('/') {
            "" => "thaw/".to_owned(),
            given => format!("{given}/"),
        };
        Ok(Self::Etcd { endpoints, prefix, tls })
    }
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedded(path) => write!(f, "embedded:{}", path.display()),
            Self::Etcd { endpoints, prefix, tls } => {
                let scheme = if *tls { "etcd+tls" } else { "etcd" };
                write!(f, "{scheme}://{}/{}", endpoints.join(","), prefix.trim_end_matches('/'))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes() {
        for text in
            ["embedded:.thaw/store.redb", "etcd://a:2379/thaw", "etcd://a:2379,b:2380/lab/one", "etcd+tls://a:2379/lab"]
        {
            assert_eq!(text.parse::<StoreUrl>().unwrap().to_string(), text);
        }
        assert_eq!("etcd://a:1".parse::<StoreUrl>().unwrap().to_string(), "etcd://a:1/thaw");
    }

    #[test]
    fn refuses_with_the_fix() {
        for text in ["", "embedded:", "redis://a:1", "etcd://", "etcd://host", "etcd://a:1,b", "etcd://me:secret@a:1"] {
            let error = text.parse::<StoreUrl>().unwrap_err().to_string();
            assert!(error.contains("write embedded:PATH"), "{error}");
        }
    }
}
