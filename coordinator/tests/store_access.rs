//! The store over TLS and with a password, against an etcd that asks for both; and what is said where something is wrong.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use etcd_client::{Client, Permission};
use std::path::{Path, PathBuf};
use thaw_coordinator::store::{self, EtcdAccess, Op, Password, StoreUrl};

/// An authority, and what it signed, as PEM files.
struct Papers {
    folder: tempfile::TempDir,
}

impl Papers {
    fn make() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for authority in ["ca", "stranger"] {
            let key = rcgen::KeyPair::generate().unwrap();
            let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
            params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
            params.distinguished_name.push(rcgen::DnType::CommonName, authority);
            let own = params.self_signed(&key).unwrap();
            let issuer = rcgen::Issuer::new(params, key);
            write(folder.path(), &format!("{authority}.pem"), &own.pem());
            for (name, usage) in [
                ("server", rcgen::ExtendedKeyUsagePurpose::ServerAuth),
                ("client", rcgen::ExtendedKeyUsagePurpose::ClientAuth),
            ] {
                let key = rcgen::KeyPair::generate().unwrap();
                let mut params = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
                params.extended_key_usages = vec![usage];
                let signed = params.signed_by(&key, &issuer).unwrap();
                write(folder.path(), &format!("{authority}-{name}.pem"), &signed.pem());
                write(folder.path(), &format!("{authority}-{name}.key"), &key.serialize_pem());
            }
        }
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn access(&self) -> EtcdAccess {
        EtcdAccess {
            ca: Some(self.path("ca.pem")),
            cert: Some(self.path("ca-client.pem")),
            key: Some(self.path("ca-client.key")),
            ..EtcdAccess::default()
        }
    }
}

fn write(folder: &Path, name: &str, text: &str) {
    std::fs::write(folder.join(name), text).unwrap();
}

async fn refusal(url: &StoreUrl, access: &EtcdAccess) -> String {
    thaw_runtime::chain(&store::open_with(url, access).await.unwrap_err())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_with_certificates_on_both_sides() {
    let papers = Papers::make();
    let file = |name: &str| papers.path(name).display().to_string();
    let (cert, key, ca) = (file("ca-server.pem"), file("ca-server.key"), file("ca.pem"));
    let options = ["--cert-file", &cert, "--key-file", &key, "--trusted-ca-file", &ca, "--client-cert-auth"];
    let Some(etcd) = common::EtcdProcess::start_with("https://127.0.0.1:0", &options) else { return };
    let url: StoreUrl = format!("etcd+tls://{}/t", etcd.address).parse().unwrap();
    let store = store::open_with(&url, &papers.access()).await.unwrap();
    store.txn(vec![], vec![Op::put("a", "1")]).await.unwrap();
    assert_eq!(store.get("a").await.unwrap().value.unwrap().value, b"1");

    // Each mistake names its setting and its file.
    let good = papers.access();
    let missing = papers.path("none.pem");
    let cases = [
        (EtcdAccess { ca: None, ..good.clone() }, "--etcd-ca is required".to_owned()),
        (
            EtcdAccess { ca: Some(missing.clone()), ..good.clone() },
            format!("--etcd-ca {} cannot be read", missing.display()),
        ),
        (EtcdAccess { key: None, ..good.clone() }, "--etcd-cert is given without --etcd-key".to_owned()),
        (EtcdAccess { cert: None, ..good.clone() }, "--etcd-key is given without --etcd-cert".to_owned()),
        (
            EtcdAccess { cert: Some(papers.path("ca-client.key")), ..good.clone() },
            format!("--etcd-cert {} holds no PEM certificate", file("ca-client.key")),
        ),
        // An authority that did not sign etcd's certificate, and a certificate that etcd's authority did not sign.
        (
            EtcdAccess { ca: Some(papers.path("stranger.pem")), ..good.clone() },
            format!("check that --etcd-ca ({}) signed etcd's certificate", file("stranger.pem")),
        ),
        (
            EtcdAccess {
                cert: Some(papers.path("stranger-client.pem")),
                key: Some(papers.path("stranger-client.key")),
                ..good.clone()
            },
            format!("that etcd takes --etcd-cert ({})", file("stranger-client.pem")),
        ),
    ];
    for (access, said) in cases {
        let text = refusal(&url, &access).await;
        assert!(text.contains(&said), "{said:?} is not in {text:?}");
    }
    let plain: StoreUrl = format!("etcd://{}/t", etcd.address).parse().unwrap();
    let text = refusal(&plain, &good).await;
    assert!(text.contains("write the store as etcd+tls://"), "{text}");
    let text = refusal(&plain, &EtcdAccess::default()).await;
    assert!(text.contains("write etcd+tls:// where it speaks TLS"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_and_its_password() {
    let Some(etcd) = common::EtcdProcess::start() else { return };
    let mut admin = Client::connect([&etcd.address], None).await.unwrap();
    for (user, password) in [("root", "of all"), ("thaw", "melting point")] {
        admin.user_add(user, password, None).await.unwrap();
    }
    admin.role_add("root").await.unwrap();
    admin.user_grant_role("root", "root").await.unwrap();
    admin.role_add("thaw").await.unwrap();
    admin.role_grant_permission("thaw", Permission::read_write("lab/").with_prefix()).await.unwrap();
    admin.user_grant_role("thaw", "thaw").await.unwrap();
    admin.auth_enable().await.unwrap();

    let url: StoreUrl = format!("etcd://{}/lab", etcd.address).parse().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("password");
    std::fs::write(&file, "melting point\n").unwrap();
    let user = Some("thaw".to_owned());
    let by_file = EtcdAccess { user: user.clone(), password_file: Some(file.clone()), ..EtcdAccess::default() };
    let secret = Some(Password("melting point".to_owned()));
    let by_text = EtcdAccess { user: user.clone(), password: secret.clone(), ..EtcdAccess::default() };
    for access in [&by_file, &by_text] {
        let store = store::open_with(&url, access).await.unwrap();
        store.txn(vec![], vec![Op::put("a", "1")]).await.unwrap();
        let lease = store.grant_lease(std::time::Duration::from_secs(60)).await.unwrap();
        store.keep_alive(lease).await.unwrap();
        assert_eq!(store.list("").await.unwrap().value.len(), 1);
        assert!(!format!("{access:?}{store:?}").contains("melting"), "ACCESS-1");
    }

    let wrong = EtcdAccess { password: Some(Password("boiling point".to_owned())), ..by_text.clone() };
    let none = folder.path().join("none");
    let cases = [
        (&url, wrong, "etcd refuses user thaw; check --etcd-user, its password".to_owned()),
        (&url, EtcdAccess::default(), "etcd asks for a user; give --etcd-user".to_owned()),
        (&url, EtcdAccess { password: None, ..by_text.clone() }, "--etcd-user thaw has no password".to_owned()),
        (&url, EtcdAccess { user: None, ..by_text.clone() }, "a password is given without a user".to_owned()),
        (&url, EtcdAccess { password: secret, ..by_file.clone() }, "two passwords are given".to_owned()),
        (
            &url,
            EtcdAccess { password_file: Some(none.clone()), ..by_file.clone() },
            format!("--etcd-password-file {} cannot be read", none.display()),
        ),
        // A prefix that its role may not touch.
        (
            &format!("etcd://{}/other", etcd.address).parse().unwrap(),
            by_text,
            "that its role may read and write the prefix".to_owned(),
        ),
    ];
    for (url, access, said) in cases {
        let text = refusal(url, &access).await;
        assert!(text.contains(&said), "{said:?} is not in {text:?}");
        assert!(!text.contains("melting") && !text.contains("boiling"), "ACCESS-1: {text}");
    }
}
