//! Certificates: from files on the proxies' machines, or from secrets.

use super::ads;
use crate::short::fleet::Tls;
use outrigger_xds::resource::{
    secret::{SecretConfig, ValidationSecret},
    tls::{CommonTls, DataSource, DownstreamTls, TlsCertificate, UpstreamTls, Validation},
};

fn file(path: &str) -> DataSource {
    DataSource::File(path.to_owned())
}

fn secret(name: &str) -> SecretConfig {
    SecretConfig {
        name: name.to_owned(),
        source: Some(ads()),
    }
}

fn common(tls: &Tls) -> CommonTls {
    let pair = tls.certificate.as_deref().zip(tls.key.as_deref());
    let certificate = pair.map(|(chain, key)| TlsCertificate {
        chain: file(chain),
        key: file(key),
    });
    CommonTls {
        certificates: certificate.into_iter().collect(),
        certificate_secrets: tls.secret.as_deref().map(secret).into_iter().collect(),
        validation: tls.ca.as_deref().map(|ca| Validation {
            trusted_ca: file(ca),
            names: Vec::new(),
        }),
        validation_secret: tls.ca_secret.as_deref().map(|name| ValidationSecret {
            secret: secret(name),
            names: Vec::new(),
        }),
        ..CommonTls::default()
    }
}

/// Towards whoever connects: who it is matters where there is somebody to believe.
pub(super) fn downstream(tls: &Tls) -> DownstreamTls {
    DownstreamTls {
        common: CommonTls {
            alpn: vec!["h2".into(), "http/1.1".into()],
            ..common(tls)
        },
        require_client_certificate: tls.ca.is_some() || tls.ca_secret.is_some(),
    }
}

/// Towards other proxies.
pub(super) fn upstream(tls: &Tls) -> UpstreamTls {
    UpstreamTls {
        common: common(tls),
        sni: String::new(),
    }
}
