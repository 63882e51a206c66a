//! TLS (RFC 8446, RFC 5246) of a check's connection: `rustls`, and what may be read of it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore, SignatureScheme};
use serde::{Deserialize, Serialize};

/// Largest file of authorities, bytes: several times what distributions ship.
const AUTHORITIES_BYTES_MAX: u64 = 4 << 20;

/// Encrypted bytes that are read of one connection: a long chain of certificates, and more content than is looked at.
const RECEIVED_BYTES_MAX: usize = 256 << 10;

/// How a check's connection is encrypted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TlsCheck {
    /// Name that the server is asked for (SNI, RFC 6066 §3) and that its certificate is verified for; `None`: none is
    /// told, and the certificate has to be for the address.
    pub sni: Option<String>,
    /// PEM file with the authorities that the certificate has to come from; `None`: every certificate is taken. It is
    /// read again when it has changed.
    pub authorities: Option<PathBuf>,
}

impl TlsCheck {
    /// First mistake in it, for whoever reads the configuration.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        let is_name = |name: &str| matches!(ServerName::try_from(name), Ok(ServerName::DnsName(_)));
        if self.sni.as_deref().is_some_and(|sni| !is_name(sni)) {
            return Some("sni must be a host name, as www.example.net".to_owned());
        }
        if self.authorities.as_deref().is_some_and(|path| !path.is_absolute()) {
            return Some("the file of authorities must be an absolute path".to_owned());
        }
        None
    }
}

/// Fault of a file of authorities.
#[derive(Debug, thiserror::Error)]
pub enum AuthoritiesError {
    /// It cannot be read.
    #[error("{0}: {1}")]
    File(PathBuf, io::Error),
    /// It has no certificate, or one that is broken.
    #[error("{0}: {1}; write a PEM file with the certificates of those who sign")]
    Content(PathBuf, String),
}

/// Checks that a file of authorities can be read and has certificates.
///
/// # Errors
/// When it cannot, or has none.
pub fn authorities(path: &Path) -> Result<(), AuthoritiesError> {
    read_authorities(path).map(drop)
}

fn read_authorities(path: &Path) -> Result<RootCertStore, AuthoritiesError> {
    let wrong = |text: String| AuthoritiesError::Content(path.to_owned(), text);
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(AUTHORITIES_BYTES_MAX + 1).read_to_end(&mut bytes))
        .map_err(|error| AuthoritiesError::File(path.to_owned(), error))?;
    if bytes.len() as u64 > AUTHORITIES_BYTES_MAX {
        return Err(wrong(format!("more than {AUTHORITIES_BYTES_MAX} bytes")));
    }
    let mut store = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&bytes) {
        let certificate = certificate.map_err(|error| wrong(error.to_string()))?;
        store.add(certificate).map_err(|error| wrong(error.to_string()))?;
    }
    if store.is_empty() { Err(wrong("no certificate in it".to_owned())) } else { Ok(store) }
}

/// Configurations of `rustls`, made when they are needed first.
#[derive(Debug, Default)]
pub struct TlsConfigs(BTreeMap<(Option<PathBuf>, bool), (FileVersion, Arc<ClientConfig>)>);

/// Time of the last change, ns, size and number of a file.
type FileVersion = Option<(i128, u64, u64)>;

impl TlsConfigs {
    /// Forgets all.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// The one for a check; `http`: HTTP/1.1 is spoken.
    ///
    /// # Errors
    /// When its authorities cannot be read.
    pub fn of(&mut self, check: &TlsCheck, http: bool) -> io::Result<Arc<ClientConfig>> {
        let version = match &check.authorities {
            None => None,
            Some(path) => {
                let at =
                    |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
                let file = std::fs::metadata(path).map_err(at)?;
                let changed_ns = i128::from(file.mtime()) * 1_000_000_000 + i128::from(file.mtime_nsec());
                Some((changed_ns, file.size(), file.ino()))
            }
        };
        let key = (check.authorities.clone(), http);
        if let Some((_, config)) = self.0.get(&key).filter(|(known, _)| *known == version) {
            return Ok(Arc::clone(config));
        }
        let config = Arc::new(config(check.authorities.as_deref(), http)?);
        self.0.insert(key, (version, Arc::clone(&config)));
        Ok(config)
    }
}

fn config(authorities: Option<&Path>, http: bool) -> io::Result<ClientConfig> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?;
    let mut config = match authorities {
        Some(path) => {
            let store = read_authorities(path).map_err(io::Error::other)?;
            builder.with_root_certificates(store).with_no_client_auth()
        }
        None => builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
            .with_no_client_auth(),
    };
    // A check is of the whole handshake each time.
    config.resumption = Resumption::disabled();
    if http {
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
    }
    Ok(config)
}

/// Takes every certificate; that the server has its key is verified all the same.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// The encrypted side of a connection.
#[derive(Debug)]
pub struct Session {
    connection: ClientConnection,
    received_bytes: usize,
}

/// Result of a look at the socket.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// Something, perhaps nothing in the clear.
    Some,
    /// The server has ended the connection.
    End,
}

impl Session {
    /// Before its first byte.
    ///
    /// # Errors
    /// When the configuration does not fit.
    pub fn new(check: &TlsCheck, address: SocketAddr, config: Arc<ClientConfig>) -> io::Result<Self> {
        let name = match &check.sni {
            Some(name) => ServerName::try_from(name.clone()).map_err(io::Error::other)?,
            None => ServerName::IpAddress(address.ip().into()),
        };
        let connection = ClientConnection::new(config, name).map_err(io::Error::other)?;
        Ok(Self { connection, received_bytes: 0 })
    }

    /// Whether the server has proven itself.
    pub fn is_ready(&self) -> bool {
        !self.connection.is_handshaking()
    }

    /// Takes what is to be sent encrypted.
    ///
    /// # Errors
    /// When it is more than is kept.
    pub fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.connection.writer().write_all(bytes)
    }

    /// Sends what there is.
    ///
    /// # Errors
    /// Those of the socket; `WouldBlock`: again when it can be written.
    pub fn flush(&mut self, socket: &mut impl io::Write) -> io::Result<()> {
        while self.connection.wants_write() {
            self.connection.write_tls(socket)?;
        }
        Ok(())
    }

    /// Reads once from the socket, and hands on what was in the clear of it.
    ///
    /// # Errors
    /// Those of the socket as they are; what is wrong with the bytes as `InvalidData`.
    pub fn receive(
        &mut self,
        socket: &mut impl io::Read,
        take: &mut dyn FnMut(&[u8]),
    ) -> io::Result<Received> {
        let bytes = self.connection.read_tls(socket)?;
        self.received_bytes += bytes;
        if bytes == 0 {
            return Ok(Received::End);
        }
        if self.received_bytes > RECEIVED_BYTES_MAX {
            let text = format!("more than {RECEIVED_BYTES_MAX} bytes came");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        let processed = self.connection.process_new_packets();
        processed.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
        let mut buffer = [0; 4_096];
        loop {
            match self.connection.reader().read(&mut buffer) {
                Ok(0) => return Ok(Received::End),
                Ok(bytes) => take(buffer.get(..bytes).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Received::Some),
                Err(error) => return Err(error),
            }
        }
    }

    /// Says that nothing more is coming (RFC 8446 §6.1), or why it ended, as far as the socket takes it at once.
    pub fn end(&mut self, socket: &mut impl io::Write) {
        self.connection.send_close_notify();
        let _ = self.flush(socket);
    }
}
