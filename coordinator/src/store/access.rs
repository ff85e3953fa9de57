//! Who this coordinator is to etcd, and how it knows etcd: files and names, checked before anything connects.
//!
//! ACCESS-1: no password is ever shown: not in errors, not in logs, not in a debug print.

use super::{Error, StoreUrl};
use etcd_client::{Certificate, ConnectOptions, Identity, TlsOptions};
use std::fmt;
use std::path::{Path, PathBuf};

/// Names of the settings, as errors give them.
const CA: &str = "--etcd-ca";
const CERT: &str = "--etcd-cert";
const KEY: &str = "--etcd-key";
const USER: &str = "--etcd-user";
const PASSWORD_FILE: &str = "--etcd-password-file";

/// A password. Its debug print hides it.
#[derive(Clone, PartialEq, Eq)]
pub struct Password(pub String);

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password(..)")
    }
}

/// What etcd is told and shown, beside its address. Nothing by default.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EtcdAccess {
    /// PEM file of the authorities that sign etcd's certificates.
    pub ca: Option<PathBuf>,
    /// PEM file of this coordinator's certificate, with `key`.
    pub cert: Option<PathBuf>,
    pub key: Option<PathBuf>,
    pub user: Option<String>,
    /// The user's password: this file's text without the line's end, or `password`.
    pub password_file: Option<PathBuf>,
    pub password: Option<Password>,
}

impl EtcdAccess {
    /// The options of a connection.
    pub(super) fn apply(&self, url: &StoreUrl, options: ConnectOptions) -> Result<ConnectOptions, Error> {
        let options = self.apply_tls(url, options)?;
        let Some(user) = &self.user else {
            if self.password_file.is_some() || self.password.is_some() {
                return Err(refuse(url, format!("a password is given without a user; name one with {USER}")));
            }
            return Ok(options);
        };
        let password = match (&self.password_file, &self.password) {
            (Some(file), None) => {
                let text = read(url, PASSWORD_FILE, file)?;
                let text = String::from_utf8(text)
                    .map_err(|_| refuse(url, format!("{PASSWORD_FILE} {} is not text", file.display())))?;
                text.trim_end_matches(['\r', '\n']).to_owned()
            }
            (None, Some(Password(password))) => password.clone(),
            (Some(_), Some(_)) => {
                let what = format!("two passwords are given; leave {PASSWORD_FILE} or THAW_ETCD_PASSWORD out");
                return Err(refuse(url, what));
            }
            (None, None) => {
                let what = format!("{USER} {user} has no password; give {PASSWORD_FILE} or THAW_ETCD_PASSWORD");
                return Err(refuse(url, what));
            }
        };
        if password.is_empty() {
            return Err(refuse(url, format!("the password of {USER} {user} is empty")));
        }
        Ok(options.with_user(user.clone(), password).with_auto_token_refresh(true))
    }

    fn apply_tls(&self, url: &StoreUrl, options: ConnectOptions) -> Result<ConnectOptions, Error> {
        if !matches!(url, StoreUrl::Etcd { tls: true, .. }) {
            for (name, file) in [(CA, &self.ca), (CERT, &self.cert), (KEY, &self.key)] {
                if let Some(file) = file {
                    let what = format!("{name} {} is for TLS; write the store as etcd+tls://", file.display());
                    return Err(refuse(url, what));
                }
            }
            return Ok(options);
        }
        let Some(ca) = &self.ca else {
            return Err(refuse(
                url,
                format!("{CA} is required: the PEM file of the authority that signed etcd's certificate"),
            ));
        };
        let authority = read_pem(url, CA, ca, "CERTIFICATE-----")?;
        let mut tls = TlsOptions::new().ca_certificate(Certificate::from_pem(authority));
        match (&self.cert, &self.key) {
            (None, None) => {}
            (Some(cert), Some(key)) => {
                let cert = read_pem(url, CERT, cert, "CERTIFICATE-----")?;
                tls = tls.identity(Identity::from_pem(cert, read_pem(url, KEY, key, "PRIVATE KEY-----")?));
            }
            (Some(_), None) => return Err(refuse(url, format!("{CERT} is given without {KEY}"))),
            (None, Some(_)) => return Err(refuse(url, format!("{KEY} is given without {CERT}"))),
        }
        Ok(options.with_tls(tls))
    }

    /// What to look at when a connection does not come about.
    pub(super) fn advice(&self, url: &StoreUrl, error: &Error) -> String {
        let chain = thaw_runtime::chain(error);
        let shown = |file: &Option<PathBuf>| file.as_ref().map_or("none".into(), |file| file.display().to_string());
        match (error, &self.user) {
            (Error::Denied { .. }, Some(user)) => {
                format!(
                    "etcd refuses user {user}; check {USER}, its password, and that its role may read and write the prefix"
                )
            }
            (Error::Denied { .. }, None) => format!("etcd asks for a user; give {USER} and {PASSWORD_FILE}"),
            // rustls and etcd say it in words alone.
            _ if chain.contains("ertificate") || chain.contains("tls") => {
                format!(
                    "no trust between this coordinator and etcd; check that {CA} ({}) signed etcd's certificate, that \
                     the certificate names this host, and that etcd takes {CERT} ({})",
                    shown(&self.ca),
                    shown(&self.cert)
                )
            }
            _ if matches!(url, StoreUrl::Etcd { tls: false, .. }) => {
                "cannot connect; check that etcd runs there, and write etcd+tls:// where it speaks TLS".to_owned()
            }
            // An etcd that does not take a certificate may close the connection before it has said so.
            _ => format!(
                "cannot connect; check that etcd runs there and speaks TLS, and that etcd takes {CERT} ({})",
                shown(&self.cert)
            ),
        }
    }
}

fn refuse(url: &StoreUrl, what: String) -> Error {
    Error::Open { url: url.to_string(), what, source: None }
}

fn read(url: &StoreUrl, name: &str, file: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(file).map_err(|error| Error::Open {
        url: url.to_string(),
        what: format!("{name} {} cannot be read", file.display()),
        source: Some(error.into()),
    })
}

fn read_pem(url: &StoreUrl, name: &str, file: &Path, kind: &str) -> Result<Vec<u8>, Error> {
    let bytes = read(url, name, file)?;
    let text = String::from_utf8_lossy(&bytes);
    if !text.contains("-----BEGIN ") || !text.contains(kind) {
        let what = kind.trim_end_matches('-').to_lowercase();
        return Err(refuse(url, format!("{name} {} holds no PEM {what}", file.display())));
    }
    Ok(bytes)
}
