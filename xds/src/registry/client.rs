//! One stream to a registry: registrations out, leases in. It ends at its first error, and does not come back by itself.

use super::Registration;
use crate::{
    ads::{REQUESTS_MAX, Server, connect, outgoing},
    problems::causes,
    protobuf,
    wire::outrigger::registry::v1::{self as wire, registry_client::RegistryClient},
};
use std::time::Duration;
use tokio::sync::mpsc;
use tonic::{Code, Status, Streaming};

/// Longest lease that is an answer.
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// Why a stream cannot be opened, or ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// The server cannot be reached, or the stream broke.
    #[error("{0}")]
    Broken(String),
    /// The server does not take what was said.
    #[error("refused: {0}")]
    Refused(String),
}

/// An open stream.
pub struct RegistryStream {
    registrations: mpsc::Sender<wire::Registration>,
    leases: Streaming<wire::Lease>,
}

fn ended(status: &Status) -> RegistryError {
    let why = format!("{:?}: {}", status.code(), causes(status));
    match status.code() {
        Code::InvalidArgument
        | Code::AlreadyExists
        | Code::ResourceExhausted
        | Code::FailedPrecondition
        | Code::PermissionDenied
        | Code::Unauthenticated
        | Code::Unimplemented => RegistryError::Refused(why),
        _ => RegistryError::Broken(why),
    }
}

/// Connects and says the first registration.
///
/// # Errors
/// The server cannot be reached, or does not want it.
pub async fn open(
    server: &Server,
    registration: &Registration,
) -> Result<RegistryStream, RegistryError> {
    let channel = connect(server).await;
    let channel = channel.map_err(|error| RegistryError::Broken(error.to_string()))?;
    let (registrations, request) = outgoing(server, REQUESTS_MAX);
    let mut client = RegistryClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX);
    let gone = |_| RegistryError::Broken("what is to be said is not taken".to_owned());
    // Before the call: some servers answer only when they have heard something.
    let first = wire::Registration::from(registration);
    registrations.send(first).await.map_err(gone)?;
    let leases = client.register(request).await;
    Ok(RegistryStream {
        registrations,
        leases: leases.map_err(|status| ended(&status))?.into_inner(),
    })
}

impl RegistryStream {
    /// Says it again, or what is new. To be followed by [`RegistryStream::lease`].
    ///
    /// # Errors
    /// Why the stream ended.
    pub async fn say(&mut self, registration: &Registration) -> Result<(), RegistryError> {
        let said = self.registrations.send(registration.into()).await;
        match said {
            Ok(()) => Ok(()),
            // The answers say why.
            Err(_) => self.lease().await.map(drop),
        }
    }

    /// For how long what was said counts.
    ///
    /// # Errors
    /// Why the stream ended.
    pub async fn lease(&mut self) -> Result<Duration, RegistryError> {
        let lease = self.leases.message().await;
        let lease = lease.map_err(|status| ended(&status))?;
        let closed = || RegistryError::Broken("the server closed it".to_owned());
        let length = lease.ok_or_else(closed)?.length.unwrap_or_default();
        protobuf::duration(length).map_err(|error| RegistryError::Broken(error.to_string()))
    }
}
