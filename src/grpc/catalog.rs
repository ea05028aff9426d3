//! `CatalogService`.

use tonic::{Request, Response, Status};

use super::proto::catalog_service_server::CatalogService;
use super::proto::{self, ListMethodsRequest, ListMethodsResponse, method_option::Type};
use crate::error::Result;
use crate::methods::{METHODS, MethodEntry, OptionKind, OptionSpec};

/// The service.
#[derive(Clone, Copy, Debug)]
pub(super) struct Catalog;

#[tonic::async_trait]
impl CatalogService for Catalog {
    async fn list_methods(
        &self,
        _request: Request<ListMethodsRequest>,
    ) -> Result<Response<ListMethodsResponse>, Status> {
        let methods = METHODS.iter().map(|entry| method(entry)).collect();
        Ok(Response::new(ListMethodsResponse { methods }))
    }
}

fn method(entry: &MethodEntry) -> proto::Method {
    let MethodEntry { id, summary, source, options, build: _, restore: _ } = entry;
    proto::Method {
        id: (*id).to_owned(),
        summary: (*summary).to_owned(),
        source: (*source).to_owned(),
        options: options.iter().map(option).collect(),
    }
}

fn option(spec: &OptionSpec) -> proto::MethodOption {
    let OptionSpec { name, help, kind, default } = spec;
    let kind = match kind {
        OptionKind::Bool => Type::BoolOption(proto::BoolOption {}),
        OptionKind::Int { min, max } => Type::IntOption(proto::IntOption { min: *min, max: *max }),
        OptionKind::Float { min, max } => {
            Type::FloatOption(proto::FloatOption { min: *min, max: *max })
        }
        OptionKind::Choice(names) => Type::ChoiceOption(proto::ChoiceOption {
            choices: names.iter().map(|name| (*name).to_owned()).collect(),
        }),
    };
    proto::MethodOption {
        name: (*name).to_owned(),
        help: (*help).to_owned(),
        default_value: (*default).to_owned(),
        r#type: Some(kind),
    }
}
