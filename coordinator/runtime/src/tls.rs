//! Mutual TLS between coordinators, workers and clients: one authority, and a certificate for each process.
//!
//! TLS-1: all or nothing. A process with TLS shows a certificate and believes only those of its authority, whichever side
//!        it is on; there is no server that asks for no certificate and no client that checks none.
//! TLS-2: a private key is in no log, error or debug output.
//!
//! The files are read once, when the process starts: a renewed certificate needs a restart.

use std::path::{Path, PathBuf};
use std::{fmt, io};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity, ServerTlsConfig};

/// Options of both binaries.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args)]
pub struct TlsOptions {
    /// Authority whose certificates are believed, a PEM file. With --tls-cert and --tls-key: mutual TLS.
    #[arg(long, global = true, env = "THAW_TLS_CA", value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,
    /// This process's certificate, a PEM file.
    #[arg(long, global = true, env = "THAW_TLS_CERT", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// The certificate's private key, a PEM file.
    #[arg(long, global = true, env = "THAW_TLS_KEY", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// Name that the coordinator's certificate must carry. Default: the host in its address.
    #[arg(long, global = true, env = "THAW_TLS_NAME", value_name = "NAME")]
    pub tls_name: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("TLS needs --tls-ca, --tls-cert and --tls-key together; {missing} is missing")]
    Incomplete { missing: &'static str },
    #[error("read the file {} of {option}", path.display())]
    Read {
        option: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the files of --tls-ca, --tls-cert and --tls-key are not certificates and a key that fit, in PEM")]
    Unusable(#[source] tonic::transport::Error),
    #[error("{address} asks for TLS; give --tls-ca, --tls-cert and --tls-key, or write http://")]
    NoFiles { address: String },
    #[error("{address} is without TLS, but --tls-ca, --tls-cert and --tls-key are given; write https://")]
    NotHttps { address: String },
}

/// Certificates and key of one process.
#[derive(Clone)]
pub struct Tls {
    authority: Certificate,
    identity: Identity,
    name: Option<String>,
}

impl fmt::Debug for Tls {
    // TLS-2.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("name", &self.name).finish_non_exhaustive()
    }
}

impl TlsOptions {
    /// Reads the files; `None` where no option names one.
    ///
    /// # Errors
    /// Some are named and some are not, or one cannot be read, or they do not fit.
    pub fn load(&self) -> Result<Option<Tls>, Error> {
        let given = [("--tls-ca", &self.tls_ca), ("--tls-cert", &self.tls_cert), ("--tls-key", &self.tls_key)];
        if given.iter().all(|(_, path)| path.is_none()) {
            return Ok(None);
        }
        let mut texts = Vec::new();
        for (option, path) in given {
            let path = path.as_deref().ok_or(Error::Incomplete { missing: option })?;
            texts.push(read(option, path)?);
        }
        let [authority, certificate, key] = &texts[..] else { unreachable!("three options were read") };
        let tls = Tls {
            authority: Certificate::from_pem(authority),
            identity: Identity::from_pem(certificate, key),
            name: self.tls_name.clone(),
        };
        // What does not parse is an error now rather than at the first connection.
        tonic::transport::Server::builder().tls_config(tls.server()).map_err(Error::Unusable)?;
        Ok(Some(tls))
    }
}

fn read(option: &'static str, path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|source| Error::Read { option, path: path.to_owned(), source })
}

impl Tls {
    /// For a server, which demands a certificate of every client (TLS-1).
    #[must_use]
    pub fn server(&self) -> ServerTlsConfig {
        ServerTlsConfig::new().identity(self.identity.clone()).client_ca_root(self.authority.clone())
    }

    fn client(&self) -> ClientTlsConfig {
        let config = ClientTlsConfig::new().identity(self.identity.clone()).ca_certificate(self.authority.clone());
        match &self.name {
            Some(name) => config.domain_name(name),
            None => config,
        }
    }
}

/// Of the address of a coordinator that a process with or without TLS was told of.
#[must_use]
pub fn scheme(tls: Option<&Tls>) -> &'static str {
    if tls.is_some() { "https" } else { "http" }
}

/// The endpoint, with TLS where its address says https.
///
/// # Errors
/// The address and the presence of TLS files contradict each other.
pub fn endpoint(endpoint: Endpoint, tls: Option<&Tls>) -> Result<Endpoint, Error> {
    let address = || endpoint.uri().to_string();
    match (endpoint.uri().scheme_str() == Some("https"), tls) {
        (true, Some(tls)) => endpoint.clone().tls_config(tls.client()).map_err(Error::Unusable),
        (false, None) => Ok(endpoint),
        (true, None) => Err(Error::NoFiles { address: address() }),
        (false, Some(_)) => Err(Error::NotHttps { address: address() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(folder: &Path) -> TlsOptions {
        let signed = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let write = |name: &str, text: String| {
            let path = folder.join(name);
            std::fs::write(&path, text).unwrap();
            Some(path)
        };
        TlsOptions {
            tls_ca: write("ca.pem", signed.cert.pem()),
            tls_cert: write("cert.pem", signed.cert.pem()),
            tls_key: write("key.pem", signed.signing_key.serialize_pem()),
            tls_name: None,
        }
    }

    #[test]
    fn all_three_files_or_none() {
        let folder = tempfile::tempdir().unwrap();
        let all = files(folder.path());
        assert!(TlsOptions::default().load().unwrap().is_none());
        assert!(all.load().unwrap().is_some());
        let without_key = TlsOptions { tls_key: None, ..all.clone() };
        assert!(without_key.load().unwrap_err().to_string().contains("--tls-key is missing"));
        let named_only = TlsOptions { tls_ca: None, ..all };
        assert!(named_only.load().unwrap_err().to_string().contains("--tls-ca is missing"));
    }

    #[test]
    fn wrong_files_are_named_and_no_key_is_shown() {
        let folder = tempfile::tempdir().unwrap();
        let all = files(folder.path());
        let missing = TlsOptions { tls_cert: Some("/nowhere/cert.pem".into()), ..all.clone() };
        assert_eq!(missing.load().unwrap_err().to_string(), "read the file /nowhere/cert.pem of --tls-cert");
        let swapped = TlsOptions { tls_cert: all.tls_key.clone(), tls_key: all.tls_cert.clone(), ..all.clone() };
        let error = swapped.load().unwrap_err();
        assert!(matches!(error, Error::Unusable(_)), "{error}");
        let key = std::fs::read_to_string(all.tls_key.as_ref().unwrap()).unwrap();
        let secret = key.lines().nth(1).unwrap();
        assert!(!crate::chain(&error).contains(secret));
        assert!(!format!("{:?}", all.load().unwrap()).contains(secret));
    }

    #[test]
    fn address_and_files_agree() {
        let folder = tempfile::tempdir().unwrap();
        let tls = files(folder.path()).load().unwrap();
        let (plain, secure) = ("http://127.0.0.1:1", "https://127.0.0.1:1");
        assert!(endpoint(Endpoint::from_static(plain), None).is_ok());
        assert!(endpoint(Endpoint::from_static(secure), tls.as_ref()).is_ok());
        let error = endpoint(Endpoint::from_static(plain), tls.as_ref()).unwrap_err().to_string();
        assert!(error.contains("write https://"), "{error}");
        let error = endpoint(Endpoint::from_static(secure), None).unwrap_err().to_string();
        assert!(error.contains("give --tls-ca"), "{error}");
    }
}
