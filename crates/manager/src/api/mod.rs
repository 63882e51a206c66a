//! REST under `/v1` (row D10): JSON, a bearer token, bodies of at most 64 KiB.

use std::sync::Arc;

use axum::Router;
use axum::extract::rejection::JsonRejection;
use axum::extract::{DefaultBodyLimit, FromRequest, Path, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, patch, post};
use cluster::manager::{Command, CommandError, Step, Token};
use serde::Deserialize;
use subtle::ConstantTimeEq as _;
use tokio::sync::oneshot;
use utoipa::OpenApi;

use crate::actor::{Event, Events, View};
use crate::proofs::{make_token, unix_s};

pub mod types;

use types::{
    Accepted, Change, ChangeStep, ClusterReport, Configuration, Drain, EventLine, Interface, IssuedToken,
    NewToken, NewUnit, NewWeight, Plan, Problem, UnitReport,
};

/// Longest body, bytes.
const BODY_BYTES_MAX: usize = 64 << 10;
/// How long a token is valid, seconds, and at most.
const TOKEN_S: u32 = 3_600;
const TOKEN_S_MAX: u32 = 7 * 86_400;

/// Shared by all requests.
#[derive(Clone)]
pub struct Api {
    events: Events,
    token: Arc<str>,
}

/// Document of the interface.
#[derive(OpenApi)]
#[openapi(
    info(title = "Anabranch cluster manager", version = "1"),
    paths(
        health,
        cluster_report,
        units,
        add_unit,
        issue_token,
        change_weight,
        drain_unit,
        remove_unit,
        change,
        plan,
        configuration,
        configure,
        events
    )
)]
pub struct Document;

/// Routes, all but `/healthz` with the token.
pub fn router(events: Events, token: Arc<str>) -> Router {
    let api = Api { events, token };
    let v1 = Router::new()
        .route("/v1/cluster", get(cluster_report))
        .route("/v1/units", get(units).post(add_unit))
        .route("/v1/tokens", post(issue_token))
        .route("/v1/units/{node}", patch(change_weight))
        .route("/v1/units/{node}", delete(remove_unit))
        .route("/v1/units/{node}/drain", post(drain_unit))
        .route("/v1/changes", post(change))
        .route("/v1/plan", get(plan))
        .route("/v1/config", get(configuration).put(configure))
        .route("/v1/events", get(self::events))
        .route_layer(middleware::from_fn_with_state(api.clone(), authorize));
    Router::new()
        .route("/healthz", get(health))
        .merge(v1)
        .fallback(|| async {
            problem(StatusCode::NOT_FOUND, "there is nothing here; see docs/openapi-manager.json")
        })
        .method_not_allowed_fallback(|| async {
            problem(StatusCode::METHOD_NOT_ALLOWED, "this is not done here; see docs/openapi-manager.json")
        })
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(api)
}

fn problem(status: StatusCode, text: &str) -> Response {
    (status, axum::Json(Problem { error: text.to_owned() })).into_response()
}

/// Why a wish was not stored.
fn refusal(error: &CommandError) -> Response {
    let status = match error {
        CommandError::Invalid(_) => StatusCode::UNPROCESSABLE_ENTITY,
        CommandError::Unknown(_) => StatusCode::NOT_FOUND,
        CommandError::Conflict(_) => StatusCode::CONFLICT,
        CommandError::Busy => StatusCode::TOO_MANY_REQUESTS,
        CommandError::NotLeading(_) => StatusCode::SERVICE_UNAVAILABLE,
        CommandError::Store(_) => StatusCode::INSUFFICIENT_STORAGE,
    };
    problem(status, &error.to_string())
}

async fn authorize(State(api): State<Api>, request: Request, next: Next) -> Response {
    let given = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let given = given.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
    if bool::from(given.as_bytes().ct_eq(api.token.as_bytes())) {
        next.run(request).await
    } else {
        problem(StatusCode::UNAUTHORIZED, "give the manager's token as \"Authorization: Bearer …\"")
    }
}

/// JSON body whose faults are told as JSON.
struct Body<T>(T);

impl<T: serde::de::DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Response;

    async fn from_request(request: Request, state: &S) -> Result<Self, Response> {
        match axum::Json::<T>::from_request(request, state).await {
            Ok(axum::Json(value)) => Ok(Self(value)),
            Err(rejection) => {
                let status = match &rejection {
                    JsonRejection::JsonDataError(_) => StatusCode::UNPROCESSABLE_ENTITY,
                    other => other.status(),
                };
                Err(problem(status, &rejection.body_text()))
            }
        }
    }
}

impl Api {
    async fn view(&self) -> Result<Box<View>, Response> {
        let (answer, view) = oneshot::channel();
        self.events.send(Event::Status(answer)).await;
        let gone = || problem(StatusCode::SERVICE_UNAVAILABLE, "the manager is going down");
        let view = view.await.map_err(|_| gone())?;
        view.map_err(|leader| problem(StatusCode::SERVICE_UNAVAILABLE, &leader))
    }

    /// Has a command stored; it is carried out afterwards.
    async fn command(&self, command: Command) -> Response {
        let (answer, result) = oneshot::channel();
        self.events.send(Event::Command(command, answer)).await;
        match result.await {
            Ok(Ok(accepted)) => (StatusCode::ACCEPTED, axum::Json(Accepted { accepted })).into_response(),
            Ok(Err(error)) => refusal(&error),
            Err(_) => problem(StatusCode::SERVICE_UNAVAILABLE, "the manager is going down"),
        }
    }

    async fn steps(&self, steps: &[ChangeStep]) -> Response {
        let steps: Result<Vec<Step>, String> = steps.iter().map(ChangeStep::step).collect();
        match steps {
            Ok(steps) => self.command(Command::Change(steps)).await,
            Err(error) => problem(StatusCode::UNPROCESSABLE_ENTITY, &error),
        }
    }
}

/// Whether the manager runs; no token is needed
#[utoipa::path(get, path = "/healthz", responses((status = 200, body = String)))]
async fn health() -> &'static str {
    "ok\n"
}

/// State of the cluster
#[utoipa::path(get, path = "/v1/cluster", responses((status = 200, body = ClusterReport)))]
async fn cluster_report(State(api): State<Api>) -> Response {
    match api.view().await {
        Ok(view) => axum::Json(ClusterReport::of(&view.status)).into_response(),
        Err(response) => response,
    }
}

/// State of the units
#[utoipa::path(get, path = "/v1/units", responses((status = 200, body = Vec<UnitReport>)))]
async fn units(State(api): State<Api>) -> Response {
    match api.view().await {
        Ok(view) => axum::Json(ClusterReport::of(&view.status).units).into_response(),
        Err(response) => response,
    }
}

/// Has a unit take part
#[utoipa::path(post, path = "/v1/units", request_body = NewUnit, responses(
    (status = 202, body = Accepted), (status = 409, body = Problem), (status = 422, body = Problem)))]
async fn add_unit(State(api): State<Api>, Body(unit): Body<NewUnit>) -> Response {
    api.steps(&[ChangeStep::Add(unit)]).await
}

/// Makes a token with which a unit enrols itself, once
#[utoipa::path(post, path = "/v1/tokens", request_body = NewToken, responses(
    (status = 201, body = IssuedToken), (status = 409, body = Problem), (status = 422, body = Problem)))]
async fn issue_token(State(api): State<Api>, Body(new): Body<NewToken>) -> Response {
    let seconds = new.valid_seconds.unwrap_or(TOKEN_S);
    if !(1..=TOKEN_S_MAX).contains(&seconds) {
        let text = format!("valid for {seconds} s: 1 to {TOKEN_S_MAX} are possible");
        return problem(StatusCode::UNPROCESSABLE_ENTITY, &text);
    }
    let Some((text, digest)) = make_token() else {
        return problem(StatusCode::INTERNAL_SERVER_ERROR, "the system has no random numbers");
    };
    let ends_s = unix_s() + u64::from(seconds);
    let token = Token { digest, node: new.node, role: new.role.into(), weight: new.weight, ends_s };
    let (answer, result) = oneshot::channel();
    api.events.send(Event::Token(token, answer)).await;
    match result.await {
        Ok(Ok(_)) => {
            let issued = IssuedToken { token: text, node: new.node, ends_unix_s: ends_s };
            (StatusCode::CREATED, axum::Json(issued)).into_response()
        }
        Ok(Err(error)) => refusal(&error),
        Err(_) => problem(StatusCode::SERVICE_UNAVAILABLE, "the manager is going down"),
    }
}

/// Gives a unit another capacity
#[utoipa::path(patch, path = "/v1/units/{node}", request_body = NewWeight, params(("node" = u16, Path)),
    responses((status = 202, body = Accepted), (status = 404, body = Problem)))]
async fn change_weight(
    State(api): State<Api>,
    Path(node): Path<u16>,
    Body(new): Body<NewWeight>,
) -> Response {
    api.steps(&[ChangeStep::Weight { node, weight: new.weight }]).await
}

/// Gives a unit no new flows; its own stay until they end
#[utoipa::path(post, path = "/v1/units/{node}/drain", request_body = Drain, params(("node" = u16, Path)),
    responses((status = 202, body = Accepted), (status = 404, body = Problem), (status = 409, body = Problem)))]
async fn drain_unit(State(api): State<Api>, Path(node): Path<u16>, Body(drain): Body<Drain>) -> Response {
    let Drain { remove, migrate } = drain;
    api.steps(&[ChangeStep::Drain { node, remove, migrate }]).await
}

/// How a unit is removed
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RemoveQuery {
    /// Also if it still has flows: they end.
    #[serde(default)]
    force: bool,
}

/// Removes a unit that has drained
#[utoipa::path(delete, path = "/v1/units/{node}", params(("node" = u16, Path), ("force" = Option<bool>, Query)),
    responses((status = 202, body = Accepted), (status = 404, body = Problem), (status = 409, body = Problem)))]
async fn remove_unit(
    State(api): State<Api>,
    Path(node): Path<u16>,
    Query(query): Query<RemoveQuery>,
) -> Response {
    api.steps(&[ChangeStep::Remove { node, force: query.force }]).await
}

/// Changes several units with one era
#[utoipa::path(post, path = "/v1/changes", request_body = Change, responses(
    (status = 202, body = Accepted), (status = 409, body = Problem), (status = 422, body = Problem)))]
async fn change(State(api): State<Api>, Body(change): Body<Change>) -> Response {
    api.steps(&change.steps).await
}

/// The change under way, and why others wait
#[utoipa::path(get, path = "/v1/plan", responses((status = 200, body = Plan)))]
async fn plan(State(api): State<Api>) -> Response {
    match api.view().await {
        Ok(view) => axum::Json(ClusterReport::of(&view.status).plan).into_response(),
        Err(response) => response,
    }
}

/// Shared interfaces and outside addresses
#[utoipa::path(get, path = "/v1/config", responses((status = 200, body = Configuration)))]
async fn configuration(State(api): State<Api>) -> Response {
    match api.view().await {
        Ok(view) => {
            let interfaces = view.state.interfaces.iter().map(Interface::of).collect();
            axum::Json(Configuration { interfaces, outside: view.state.outside.clone() }).into_response()
        }
        Err(response) => response,
    }
}

/// Replaces them
#[utoipa::path(put, path = "/v1/config", request_body = Configuration, responses(
    (status = 202, body = Accepted), (status = 422, body = Problem)))]
async fn configure(State(api): State<Api>, Body(new): Body<Configuration>) -> Response {
    let interfaces: Result<Vec<_>, String> = new.interfaces.iter().map(Interface::shared).collect();
    match interfaces {
        Ok(interfaces) => api.command(Command::Configure { interfaces, outside: new.outside }).await,
        Err(error) => problem(StatusCode::UNPROCESSABLE_ENTITY, &error),
    }
}

/// The last thousand lines of the log
#[utoipa::path(get, path = "/v1/events", responses((status = 200, body = Vec<EventLine>)))]
async fn events(State(api): State<Api>) -> Response {
    match api.view().await {
        Ok(view) => axum::Json(view.events).into_response(),
        Err(response) => response,
    }
}
