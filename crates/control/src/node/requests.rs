//! Requests of operators that change what flows and WANs are worth, taken over at once.

use super::Node;
use crate::commands::Commands;
use crate::config::classes::TrafficClass;
use crate::gateway::engine::EngineHandle;
use crate::protocol::{Request, Response, WanWish};

impl Node {
    /// Answers a request about services.
    pub(crate) fn answer(&mut self, request: &Request) -> Response {
        let engine = &EngineHandle::new(&self.engine, &self.handle_state);
        let response =
            Commands { gateway: &mut self.supervisor, config: &self.config, engine }.answer(request);
        let by_groups = |class: &TrafficClass| class.groups.iter().any(|groups| !groups.is_empty());
        if matches!(request, Request::GroupChange { .. }) && self.config.classes.iter().any(by_groups) {
            self.tell_engine_anew();
        }
        response
    }

    /// Carries out `anabranch path`.
    pub(crate) fn change_wan(&mut self, name: &str, wish: &WanWish) -> Response {
        if let Err(error) = self.wan_changes.change(name, wish, &mut self.config.wans) {
            return Response::error(error.to_string());
        }
        tracing::info!(wan = name, ?wish, "changed by command");
        self.generation += 1;
        self.refresh();
        let left = self.lives.iter().any(|live| live.wan.up);
        let warning = (!left).then(|| "no WAN is up now".to_owned());
        Response { warning, ..Response::done() }
    }

    /// Tells the engine of the WANs as they are.
    pub(super) fn tell_wans(&mut self) {
        self.tell_engine(self.lives.iter().map(|live| live.wan.clone()).collect());
    }

    /// As after a reload: what the engine was told of WANs and addresses may be the same.
    pub(super) fn tell_engine_anew(&mut self) {
        self.generation += 1;
        self.tell_wans();
    }
}
