//! Which failed calls a server has certainly done nothing for.

use std::error::Error;
use std::io::{self, ErrorKind};

use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// Whether a call was not admitted: it was refused as DRAINING, or its client knows from the protocol
/// that the server has not processed it: there is no connection for it, the request was never sent, or
/// its stream lies beyond the last one that the server's GOAWAY names. A client may send it elsewhere.
pub(crate) fn was_not_admitted(status: &Status) -> bool {
    let info = status.get_details_error_info();
    if status.code() == Code::Unavailable && info.is_some_and(|info| info.reason == "DRAINING") {
        return true;
    }
    let mut cause = status.source();
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>()
            && error.kind() == ErrorKind::ConnectionRefused
        {
            return true;
        }
        if error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_canceled) {
            return true;
        }
        if let Some(error) = error.downcast_ref::<h2::Error>()
            && ((error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR))
                || error.reason() == Some(h2::Reason::REFUSED_STREAM))
        {
            return true;
        }
        cause = error.source();
    }
    false
}
