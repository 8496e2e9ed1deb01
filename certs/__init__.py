"""Who belongs to the region, and how it proves it: authority, invites, enrolment, renewal, revocation,
run-time credentials and the check on every call. Knows no DICOM, and owns no port but the enrolment one.

What the other packages use:

    authority    Authority.init(folder, region, passphrase=None), .open(folder): region, pin, bundle, issue;
                 hub_identity(authority_folder, folder, name="hub")
    profiles     Profile (node, portal, hub), Member (a `spiffe://<region>/...` identity), slug(text)
    devices      DeviceName, issue_device(authority_folder, ledger, name, folder, ...): DICOM over TLS
    invites      create_invite(ledger, *, profile, hospital, ward, issuer, address, pin, life_s, who) -> str
    joining      enrol(invite_text, folder) -> Identity
    enrolment    EnrolmentServer(authority, ledger, identity, settings): start(), stop(), port
    identity     Identity.load(folder): uri, region, profile, ward, hospital, ward_name, issuer,
                 hub_addresses, not_after_us, key_pem, chain_pem, roots_pem, fingerprint
    credentials  server_credentials(identity), channel(identity, address), channel_sync(identity, address),
                 SERVER_OPTIONS
    renewal      RenewalThread (a process's), renew (one time), Renewal (when), health(identity, now_us)
    reissue      CertificatesServicer(authority, ledger): the hub's side of renewal
    gate         Gate(ledger): a grpc.aio server interceptor with start() and stop(); peer(context) -> Peer
    registry     revoke(ledger, subject, *, reason, who) -> the certificates that were revoked
"""

import protos as protos  # before gRPC: says which TLS it speaks
