//! What stands before every service the worker serves: only root may call, and the trace shows no content.

use std::task::{Context, Poll};
use std::time::Instant;

use futures_util::future::{BoxFuture, Either, Ready, ready};
use http::{Request, Response};
use tonic::body::Body;
use tonic::transport::server::UdsConnectInfo;
use tonic::{Code, Status};
use tower::{Layer, Service};

/// Lets only callers of UID 0 through, by the socket's credentials. The sockets' modes say the same; this holds where
/// a directory was opened too wide.
#[derive(Debug, Clone, Copy)]
pub struct CallerIsRoot;

impl<S> Layer<S> for CallerIsRoot {
    type Service = RootOnly<S>;
    fn layer(&self, inner: S) -> RootOnly<S> {
        RootOnly { inner }
    }
}

/// The service [`CallerIsRoot`] makes.
#[derive(Debug, Clone)]
pub struct RootOnly<S> {
    inner: S,
}

impl<S> Service<Request<Body>> for RootOnly<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Either<S::Future, Ready<Result<S::Response, S::Error>>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let peer = request.extensions().get::<UdsConnectInfo>().and_then(|info| info.peer_cred);
        if peer.is_some_and(|peer| peer.uid() == 0) {
            return Either::Left(self.inner.call(request));
        }
        tracing::warn!(uid = peer.map(|peer| peer.uid()), "a caller that is not root was turned away");
        Either::Right(ready(Ok(Status::permission_denied("only root may call this driver").into_http())))
    }
}

/// Writes one line a call at level debug: method, code, time. Never a field of a message: they hold secrets.
#[derive(Debug, Clone, Copy)]
pub struct RedactedTrace;

impl<S> Layer<S> for RedactedTrace {
    type Service = Traced<S>;
    fn layer(&self, inner: S) -> Traced<S> {
        Traced { inner }
    }
}

/// The service [`RedactedTrace`] makes.
#[derive(Debug, Clone)]
pub struct Traced<S> {
    inner: S,
}

impl<S> Service<Request<Body>> for Traced<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<S::Response, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let method = request.uri().path().to_owned();
        let start = Instant::now();
        let call = self.inner.call(request);
        Box::pin(async move {
            let answer = call.await;
            // An error is answered by headers alone; a success ends with trailers, and has no code here yet.
            let status = answer.as_ref().ok().and_then(|answer| Status::from_header_map(answer.headers()));
            let code = status.map_or(Code::Ok, |status| status.code());
            tracing::debug!(%method, ?code, ms = start.elapsed().as_millis(), "call");
            answer
        })
    }
}
