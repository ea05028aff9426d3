//! Decisions of the gate, without a network: those of each credential, and of each kind of method.

use std::path::PathBuf;

use jsonwebtoken::{Algorithm, EncodingKey, Header, encode, get_current_timestamp};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_RSA_SHA256, RsaKeySize};
use serde_json::{Value, json};

use tonic::codegen::http::Request;

use super::*;

const LIST: &str = "/vitq.v1.ModelService/ListModels";
const CLASSIFY: &str = "/vitq.v1.InferenceService/Classify";
const EVALUATE: &str = "/vitq.v1.EvaluationService/Evaluate";
const QUANTIZE: &str = "/vitq.v1.QuantizationService/Quantize";
const UPLOAD: &str = "/vitq.v1.UploadService/Upload";
const UNLOAD: &str = "/vitq.v1.ModelService/UnloadModel";
const CANCEL: &str = "/google.longrunning.Operations/CancelOperation";
const HEALTH: &str = "/grpc.health.v1.Health/Check";
const REFLECTION: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
const UNKNOWN: &str = "/vitq.v1.Future/Method";

fn request(path: &str, authorization: &[&str]) -> Request<()> {
    let mut request = Request::builder().uri(path);
    for value in authorization {
        request = request.header(AUTHORIZATION, *value);
    }
    request.body(()).unwrap()
}

/// Code-like name of the decision: the principal's name, or what is wrong.
fn decide(gate: &Gate, request: &Request<()>) -> String {
    let (call, ()) = request.clone().into_parts();
    match gate.admit(&call) {
        Ok(principal) => principal.name.to_string(),
        Err(Error::Unauthenticated(reason)) => format!("{reason:?}"),
        Err(Error::PermissionDenied { needs, .. }) => format!("needs {needs}"),
        Err(other) => panic!("{other}"),
    }
}

/// A value as if it had been read from a file.
fn fixed<T>(value: impl Fn() -> T + Send + Sync + 'static) -> Arc<Reloadable<T>> {
    let nothing: Vec<PathBuf> = Vec::new();
    Arc::new(Reloadable::open(nothing, move |_| Ok(value())).unwrap())
}

fn tokens(text: String) -> Option<Arc<Reloadable<Tokens>>> {
    Some(fixed(move || Tokens::parse(text.as_bytes()).unwrap()))
}

#[test]
fn a_client_is_one_on_every_port_and_in_both_notations() {
    let gate = Gate::default();
    let of = |address: &str| {
        let mut request = request(CLASSIFY, &[]);
        let address = address.parse().unwrap();
        request.extensions_mut().insert(Peer { address, certificate: None });
        decide(&gate, &request)
    };
    assert_eq!(of("192.0.2.7:1000"), "client:192.0.2.7");
    assert_eq!(of("[::ffff:192.0.2.7]:2000"), "client:192.0.2.7");
    assert_eq!(decide(&gate, &request(CLASSIFY, &[])), "client:unknown");
    assert_eq!(&*principal(&tonic::Request::new(())).name, "client:unknown");
}

#[test]
fn strangers_do_not_control_an_open_server_that_they_can_reach() {
    let gate = Gate { is_exposed: true, ..Gate::default() };
    for path in [LIST, CLASSIFY, QUANTIZE, HEALTH, REFLECTION] {
        assert_eq!(decide(&gate, &request(path, &[])), "client:unknown", "{path}");
    }
    for path in [UPLOAD, UNLOAD] {
        assert!(decide(&gate, &request(path, &[])).starts_with("needs authentication"), "{path}");
        assert_eq!(decide(&Gate::default(), &request(path, &[])), "client:unknown", "{path}");
    }
}

#[test]
fn each_scope_opens_its_own_methods_and_no_others() {
    let paths = [LIST, CLASSIFY, EVALUATE, QUANTIZE, UPLOAD, UNLOAD, CANCEL, REFLECTION, UNKNOWN];
    for (scopes, open) in [
        ("infer", vec![LIST, CLASSIFY]),
        ("evaluate", vec![LIST, EVALUATE, CANCEL]),
        ("quantize", vec![LIST, QUANTIZE, UPLOAD, CANCEL]),
        ("admin", vec![LIST, UNLOAD, CANCEL, REFLECTION, UNKNOWN]),
    ] {
        let NewToken { token, line } = new_token("a", Scopes::parse(scopes).unwrap()).unwrap();
        let gate = Gate { tokens: tokens(line), ..Gate::default() };
        let authorization = format!("Bearer {token}");
        for path in paths {
            let decision = decide(&gate, &request(path, &[&authorization]));
            if open.contains(&path) {
                assert_eq!(decision, "token:a", "{scopes}: {path}");
            } else {
                assert!(decision.starts_with("needs scope "), "{scopes}: {path}: {decision}");
            }
            assert_eq!(decide(&gate, &request(path, &[])), "Missing", "{path}");
        }
        assert_eq!(decide(&gate, &request(HEALTH, &[])), "client:unknown");
        let gate = Gate { reflection: true, ..gate };
        assert_eq!(decide(&gate, &request(REFLECTION, &[])), "client:unknown");
    }
}

#[test]
fn a_header_is_one_bearer_token_that_is_in_the_file() {
    let NewToken { token, line } = new_token("a", Scopes::all()).unwrap();
    let gate = Gate { tokens: tokens(line), ..Gate::default() };
    let good = format!("bearer {token}");
    assert_eq!(decide(&gate, &request(CLASSIFY, &[&good])), "token:a");
    let basic = format!("Basic {token}");
    for wrong in [
        &[good.as_str(), good.as_str()][..],
        &[&basic],
        &[&token],
        &["Bearer"],
        &["Bearer "],
        &["Bearer vitq_00"],
        &[&good[..good.len() - 1]],
    ] {
        assert_eq!(decide(&gate, &request(CLASSIFY, wrong)), "Invalid", "{wrong:?}");
    }
}

#[test]
fn certificates_have_the_scopes_of_the_file_or_the_servers_own() {
    let file = "b.example certificate admin";
    let gate = Gate {
        tokens: tokens(file.to_owned()),
        certificates: Some(Scopes::parse("infer").unwrap()),
        ..Gate::default()
    };
    let of = |path: &str, names: &[&str]| {
        let mut request = request(path, &[]);
        let certificate = names.iter().map(|name| (*name).to_owned()).collect();
        let address = "192.0.2.7:1".parse().unwrap();
        request.extensions_mut().insert(Peer { address, certificate: Some(certificate) });
        decide(&gate, &request)
    };
    assert_eq!(of(UNLOAD, &["spiffe://x/b", "b.example"]), "certificate:b.example");
    assert_eq!(of(CLASSIFY, &["b.example"]), "needs scope infer");
    assert_eq!(of(CLASSIFY, &["spiffe://x/a", "a.example"]), "certificate:spiffe://x/a");
    assert_eq!(of(UNLOAD, &["a.example"]), "needs scope admin");
    assert_eq!(of(CLASSIFY, &[]), "Invalid", "a certificate without a name");
    // A token says more than a certificate, even where it is wrong.
    let mut wrong = request(CLASSIFY, &["Bearer x"]);
    let certificate = Some(Arc::from(["b.example".to_owned()]));
    wrong.extensions_mut().insert(Peer { address: "192.0.2.7:1".parse().unwrap(), certificate });
    assert_eq!(decide(&gate, &wrong), "Invalid");
}

/// A pair of keys of an issuer.
struct Issuer {
    algorithm: Algorithm,
    signing: EncodingKey,
    public: String,
}

impl Issuer {
    fn new(algorithm: Algorithm) -> Self {
        let rsa = || KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048).unwrap();
        let (pair, signing) = if algorithm == Algorithm::RS256 {
            let pair = rsa();
            let signing = EncodingKey::from_rsa_pem(pair.serialize_pem().as_bytes());
            (pair, signing.unwrap())
        } else {
            let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
            let signing = EncodingKey::from_ec_pem(pair.serialize_pem().as_bytes());
            (pair, signing.unwrap())
        };
        Self { algorithm, signing, public: pair.public_key_pem() }
    }

    /// A gate that believes it.
    fn gate(&self) -> Gate {
        let public = self.public.clone();
        let keys = fixed(move || JwtKeys::parse(public.as_bytes()).unwrap());
        let (issuer, audience) = ("https://issuer".to_owned(), "vitq".to_owned());
        Gate { jwt: Some(Jwt { keys, issuer, audience }), ..Gate::default() }
    }

    fn sign(&self, claims: &Value) -> String {
        encode(&Header::new(self.algorithm), claims, &self.signing).unwrap()
    }
}

/// Claims that are believed, changed where `changes` says so; null removes.
fn claims(changes: &Value) -> Value {
    let mut claims = json!({
        "iss": "https://issuer", "aud": "vitq", "sub": "alice", "scope": "openid infer",
        "exp": get_current_timestamp() + 600,
    });
    for (name, value) in changes.as_object().unwrap() {
        claims[name] = value.clone();
        if value.is_null() {
            claims.as_object_mut().unwrap().remove(name);
        }
    }
    claims
}

fn decide_jwt(gate: &Gate, path: &str, token: &str) -> String {
    decide(gate, &request(path, &[&format!("Bearer {token}")]))
}

#[test]
fn an_issuers_tokens_are_believed_as_far_as_their_claims_go() {
    let now = get_current_timestamp();
    for algorithm in [Algorithm::RS256, Algorithm::ES256] {
        let issuer = Issuer::new(algorithm);
        let gate = issuer.gate();
        for (changes, expected) in [
            (json!({}), "jwt:alice"),
            (json!({ "aud": ["other", "vitq"] }), "jwt:alice"),
            (json!({ "scope": ["infer"] }), "jwt:alice"),
            (json!({ "nbf": now - 60 }), "jwt:alice"),
            (json!({ "scope": "admin" }), "needs scope infer"),
            (json!({ "scope": null }), "needs scope infer"),
            (json!({ "exp": now - 600 }), "Expired"),
            (json!({ "exp": null }), "Invalid"),
            (json!({ "nbf": now + 600 }), "Invalid"),
            (json!({ "aud": "other" }), "Invalid"),
            (json!({ "aud": null }), "Invalid"),
            (json!({ "iss": "https://other" }), "Invalid"),
            (json!({ "iss": null }), "Invalid"),
            (json!({ "sub": null }), "Invalid"),
            (json!({ "sub": "" }), "Invalid"),
            (json!({ "sub": "a\nb" }), "Invalid"),
            (json!({ "sub": "x".repeat(tokens::MAX_NAME + 1) }), "Invalid"),
        ] {
            let token = issuer.sign(&claims(&changes));
            assert_eq!(decide_jwt(&gate, CLASSIFY, &token), expected, "{algorithm:?} {changes}");
        }
    }
}

#[test]
fn the_key_says_the_algorithm_not_the_token() {
    let issuer = Issuer::new(Algorithm::RS256);
    let gate = issuer.gate();
    let good = issuer.sign(&claims(&json!({})));
    assert_eq!(decide_jwt(&gate, CLASSIFY, &good), "jwt:alice");
    let payload = good.split('.').nth(1).unwrap();
    let signature = good.split('.').nth(2).unwrap();
    // {"alg":"none","typ":"JWT"}
    let none = "eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0";
    let public = EncodingKey::from_secret(issuer.public.as_bytes());
    let symmetric = encode(&Header::new(Algorithm::HS256), &claims(&json!({})), &public).unwrap();
    let stranger = Issuer::new(Algorithm::RS256).sign(&claims(&json!({})));
    let other_kind = Issuer::new(Algorithm::ES256).sign(&claims(&json!({})));
    let longer_hash =
        encode(&Header::new(Algorithm::RS512), &claims(&json!({})), &issuer.signing).unwrap();
    let critical = Header { crit: Some(vec!["exp".to_owned()]), ..Header::new(Algorithm::RS256) };
    let critical = encode(&critical, &claims(&json!({})), &issuer.signing).unwrap();
    let other_claims = issuer.sign(&claims(&json!({ "sub": "mallory" })));
    let swapped = other_claims.rsplit_once('.').unwrap().0;
    for forged in [
        format!("{none}.{payload}."),
        format!("{none}.{payload}.{signature}"),
        symmetric,
        stranger,
        other_kind,
        longer_hash,
        critical,
        format!("{swapped}.{signature}"),
        good.rsplit_once('.').unwrap().0.to_owned(),
        format!("{good}x"),
        "..".to_owned(),
    ] {
        assert_eq!(decide_jwt(&gate, CLASSIFY, &forged), "Invalid", "{forged}");
    }
}

#[test]
fn a_set_of_keys_is_searched_by_the_tokens_key_id() {
    let issuer = Issuer::new(Algorithm::ES256);
    let jwk = |id: &str| {
        let key = jsonwebtoken::jwk::Jwk::from_encoding_key(&issuer.signing, Algorithm::ES256);
        let mut jwk = serde_json::to_value(key.unwrap()).unwrap();
        jwk["kid"] = json!(id);
        jwk
    };
    let symmetric = json!({ "kty": "oct", "k": "c2VjcmV0", "kid": "s", "alg": "HS256" });
    let mut secret = jwk("e");
    secret["use"] = json!("enc");
    let set = json!({ "keys": [symmetric, secret, jwk("1"), jwk("2")] }).to_string();
    let keys = fixed(move || JwtKeys::parse(set.as_bytes()).unwrap());
    let (iss, audience) = ("https://issuer".to_owned(), "vitq".to_owned());
    let gate = Gate { jwt: Some(Jwt { keys, issuer: iss, audience }), ..Gate::default() };
    for (id, expected) in [
        (Some("1"), "jwt:alice"),
        (Some("2"), "jwt:alice"),
        (Some("3"), "Invalid"),
        (Some("s"), "Invalid"),
        (Some("e"), "Invalid"),
        (None, "Invalid"),
    ] {
        let kid = id.map(str::to_owned);
        let header = Header { kid, ..Header::new(Algorithm::ES256) };
        let token = encode(&header, &claims(&json!({})), &issuer.signing).unwrap();
        assert_eq!(decide_jwt(&gate, CLASSIFY, &token), expected, "{id:?}");
    }
    let only_symmetric = br#"{"keys":[{"kty":"oct","k":"c2VjcmV0","kid":"s"}]}"#;
    for unusable in [&only_symmetric[..], br#"{"keys":[]}"#, b"text", b""] {
        assert!(JwtKeys::parse(unusable).is_err());
    }
}
