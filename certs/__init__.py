"""Who belongs to the region, and how it proves it: authority, invites, enrolment, renewal, revocation,
run-time credentials and the check on every call. Knows no DICOM, and owns no port but the enrolment one.

What the other packages use:

    authority    Authority.init(folder, region, passphrase=None) / .open(folder); .region, .pin, .bundle,
                 .issue(member, public_key, life_s=...); hub_identity(authority_folder, folder, name="hub")
    profiles     Profile (node, portal, hub), Member (a `spiffe://<region>/...` identity), slug(text)
    invites      create_invite(ledger, *, profile, hospital, ward, issuer, address, pin, life_s, who) -> str
    registry     revoke(ledger, subject, *, reason, who) -> the certificates revoked; register(...)
    enrolment    EnrolmentServer(authority, ledger, identity_folder, settings): start(), stop(), port
    joining      enrol(invite_text, folder) -> Identity
    identity     Identity.load(folder): uri, region, profile, ward, hospital, ward_name, issuer,
                 hub_addresses, not_after_us, key_pem, chain_pem, roots_pem, fingerprint
    credentials  server_credentials(identity), channel(identity, address), channel_sync(identity,
                 address), SERVER_OPTIONS
    renewal      Renewal (the state machine), RenewalThread for a process,
                 health(identity, now_us), CertificatesServicer (the hub's side)
    gate         Gate(ledger): a grpc.aio server interceptor with start() and stop(); peer(context) -> Peer
"""

import protos as protos  # before gRPC: says which TLS it speaks
