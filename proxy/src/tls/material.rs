//! What a TLS context is made of: the bytes of its files and secrets, as they were when it was last built.

use super::{certificate::Certificate, pem};
use outrigger_xds::resource::{
    secret::{Secret, SecretConfig},
    tls::CommonTls,
};
use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Finds a secret, if it is there.
pub(crate) type Find<'a> = &'a dyn Fn(&SecretConfig) -> Option<Arc<Secret>>;

/// What an error says while secrets are not there.
const NOT_READY: &str = "TLS secrets are not ready";

/// Why no hand is shaken.
pub(super) fn not_ready() -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, NOT_READY)
}

pub(super) fn is_not_ready(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotConnected && error.to_string() == NOT_READY
}

/// What a context was last built of, or last tried to be.
#[derive(Debug, Default)]
pub(crate) struct Material(Mutex<Tried>);

#[derive(Debug, Default)]
struct Tried {
    fingerprint: Option<u64>,
    common: Option<CommonTls>,
    certificates: Vec<Certificate>,
    cas: Vec<Certificate>,
}

impl Material {
    /// Of a context that is new, with its secrets in place if they are there.
    pub(super) fn new(
        common: &CommonTls,
        find: Find<'_>,
    ) -> Result<(Self, Option<CommonTls>), String> {
        let material = Self::default();
        let resolved = material.renewed(common, find)?;
        if let Some(common) = &resolved {
            material.shown(common);
        }
        Ok((material, resolved))
    }

    fn tried(&self) -> MutexGuard<'_, Tried> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The context with its secrets in place, if that is something else than was last tried.
    pub(super) fn renewed(
        &self,
        common: &CommonTls,
        find: Find<'_>,
    ) -> Result<Option<CommonTls>, String> {
        let Some(resolved) = common.resolve(find)? else {
            return Ok(None);
        };
        let fingerprint = Some(pem::fingerprint(&resolved));
        let mut tried = self.tried();
        if tried.fingerprint == fingerprint && tried.common.as_ref() == Some(&resolved) {
            return Ok(None);
        }
        tried.fingerprint = fingerprint;
        tried.common = Some(resolved.clone());
        Ok(Some(resolved))
    }

    /// This is in effect now.
    pub(super) fn shown(&self, common: &CommonTls) {
        let (certificates, cas) = pem::shown(common);
        let mut tried = self.tried();
        (tried.certificates, tried.cas) = (certificates, cas);
    }

    /// Files whose change may change it.
    pub(crate) fn files(&self) -> Vec<String> {
        let tried = self.tried();
        let files = tried.common.iter().flat_map(CommonTls::files);
        files.map(str::to_owned).collect()
    }

    /// Our certificates and those of whom we believe.
    pub(crate) fn certificates(&self) -> (Vec<Certificate>, Vec<Certificate>) {
        let tried = self.tried();
        (tried.certificates.clone(), tried.cas.clone())
    }
}
