//! Who calls.

use tonic::Request;

/// What quotas are counted by: the client's address without its port, `client:192.0.2.7`.
pub(super) fn principal<T>(request: &Request<T>) -> String {
    match request.remote_addr() {
        Some(address) => format!("client:{}", address.ip().to_canonical()),
        None => "client:unknown".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use tonic::transport::server::TcpConnectInfo;

    use super::*;

    #[test]
    fn a_client_is_one_on_every_port_and_in_both_notations() {
        let of = |address: &str| {
            let mut request = Request::new(());
            let remote_addr = Some(address.parse::<SocketAddr>().unwrap());
            request.extensions_mut().insert(TcpConnectInfo { local_addr: None, remote_addr });
            principal(&request)
        };
        assert_eq!(of("192.0.2.7:1000"), "client:192.0.2.7");
        assert_eq!(of("[::ffff:192.0.2.7]:2000"), "client:192.0.2.7");
        assert_eq!(principal(&Request::new(())), "client:unknown");
    }
}
