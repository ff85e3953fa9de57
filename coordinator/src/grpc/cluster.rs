//! ClusterService: the workers and the coordinator itself.

use super::Services;
use thaw_proto::pb;
use tonic::{Request, Response, Status};

#[tonic::async_trait]
impl pb::cluster_service_server::ClusterService for Services {
    async fn list_workers(
        &self,
        _: Request<pb::ListWorkersRequest>,
    ) -> Result<Response<pb::ListWorkersResponse>, Status> {
        let workers = self.leading().await?.driver.workers().await.map_err(super::errors::driver)?;
        Ok(Response::new(pb::ListWorkersResponse { workers }))
    }

    async fn get_leader(&self, _: Request<pb::GetLeaderRequest>) -> Result<Response<pb::Leader>, Status> {
        match crate::leader::current(self.store.as_ref()).await {
            Ok(Some((epoch, identity))) => {
                Ok(Response::new(pb::Leader { name: identity.name, epoch: epoch.0, address: identity.address }))
            }
            Ok(None) => Err(super::errors::no_leader()),
            Err(error) => Err(super::errors::store(&error)),
        }
    }
}
