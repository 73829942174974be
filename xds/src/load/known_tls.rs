//! The part of [`super::known`] about TLS.

/// Fields by message that a configuration may not carry yet.
pub(super) const NOT_SUPPORTED: &[(&str, &[&str])] = &[
    (
        "envoy.extensions.transport_sockets.tls.v3.CertificateValidationContext",
        &[
            "allow_expired_certificate",
            "ca_certificate_provider_instance",
            "crl",
            "custom_validator_config",
            "max_verify_depth",
            "only_verify_leaf_cert_crl",
            "require_signed_certificate_timestamp",
            "system_root_certs",
            "trust_chain_verification",
            "verify_certificate_hash",
            "verify_certificate_spki",
        ],
    ),
    (
        "envoy.extensions.transport_sockets.tls.v3.CommonTlsContext",
        &[
            "custom_handshaker",
            "custom_tls_certificate_selector",
            "key_log",
            "tls_certificate_certificate_provider",
            "tls_certificate_certificate_provider_instance",
            "tls_certificate_provider_instance",
            "validation_context_certificate_provider",
            "validation_context_certificate_provider_instance",
        ],
    ),
    (
        "envoy.extensions.transport_sockets.tls.v3.CommonTlsContext.CombinedCertificateValidationContext",
        &[
            "validation_context_certificate_provider",
            "validation_context_certificate_provider_instance",
        ],
    ),
    (
        "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        &[
            "full_scan_certs_on_sni_mismatch",
            "ocsp_staple_policy",
            "prefer_client_ciphers",
            "require_sni",
        ],
    ),
    (
        "envoy.extensions.transport_sockets.tls.v3.SubjectAltNameMatcher",
        &["oid"],
    ),
    (
        "envoy.extensions.transport_sockets.tls.v3.TlsCertificate",
        &["password", "pkcs12", "private_key_provider"],
    ),
    (
        "envoy.extensions.transport_sockets.tls.v3.TlsParameters",
        &["compliance_policies", "signature_algorithms"],
    ),
    (
        "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        &[
            "allow_renegotiation",
            "auto_host_sni",
            "auto_sni_san_validation",
            "enforce_rsa_key_usage",
        ],
    ),
];

/// Fields by message that have no effect here and may be carried.
pub(super) const IGNORED: &[(&str, &[&str])] = &[
    (
        "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        &[
            "disable_stateful_session_resumption",
            "disable_stateless_session_resumption",
            "session_ticket_keys",
            "session_ticket_keys_sds_secret_config",
            "session_timeout",
        ],
    ),
    (
        "envoy.extensions.transport_sockets.tls.v3.TlsCertificate",
        &["ocsp_staple", "signed_certificate_timestamp"],
    ),
    (
        "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        &["max_session_keys"],
    ),
];
