//! The log: one line an event on standard error, with a UTC timestamp.
//!
//! Only this crate's own events are printed, at every level: the HTTP, TLS, Vault and Kubernetes libraries trace
//! headers and bodies, which hold tokens and secrets. No environment variable changes what is printed.

use std::fmt::{self, Write};
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use tracing::level_filters::LevelFilter;
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormattedFields, MakeWriter};
use tracing_subscriber::layer::{Context, Filter, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

/// The most verbose level that is printed, as an index of [`LEVELS`].
static LEVEL: AtomicUsize = AtomicUsize::new(2);
const LEVELS: [Level; 5] = [Level::ERROR, Level::WARN, Level::INFO, Level::DEBUG, Level::TRACE];

/// Starts the log of this process. A second call only sets the level.
pub fn init(level: Level) {
    set_level(level);
    // The only error is that a subscriber is already set: that of the first call.
    let _ = tracing::subscriber::set_global_default(subscriber(&LEVEL, io::stderr));
}

/// Changes the level, at once and for every thread.
pub fn set_level(level: Level) {
    store(&LEVEL, level);
}

fn store(to: &AtomicUsize, level: Level) {
    let index = LEVELS.iter().position(|known| *known == level).unwrap_or(2);
    to.store(index, Ordering::Relaxed);
    // Call sites remember whether they are enabled, and the level is part of what they remember.
    tracing::callsite::rebuild_interest_cache();
}

fn subscriber<W>(level: &'static AtomicUsize, writer: W) -> impl Subscriber + Send + Sync
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let lines = tracing_subscriber::fmt::layer().event_format(Line).with_writer(writer);
    tracing_subscriber::registry().with(lines.with_filter(Own { level }))
}

/// Lets only this crate's targets pass, up to the level.
struct Own {
    level: &'static AtomicUsize,
}

impl Own {
    fn level(&self) -> Level {
        LEVELS.get(self.level.load(Ordering::Relaxed)).copied().unwrap_or(Level::INFO)
    }

    fn prints(&self, metadata: &Metadata<'_>) -> bool {
        let target = metadata.target();
        // Not a bare prefix: a crate named `sealmount_x` would be a foreign one.
        let own = target == "sealmount" || target.starts_with("sealmount::");
        own && *metadata.level() <= self.level()
    }
}

impl<S> Filter<S> for Own {
    fn enabled(&self, metadata: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        self.prints(metadata)
    }

    fn callsite_enabled(&self, metadata: &'static Metadata<'static>) -> Interest {
        if self.prints(metadata) { Interest::always() } else { Interest::never() }
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::from_level(self.level()))
    }
}

/// `2026-01-31T12:00:00.000000Z  INFO sealmount::csi: span{fields}: message field=value`
///
/// The library's own formats let a line feed in a value start a new line, and values hold text that pod authors
/// chose: they could write log lines of their own.
struct Line;

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, ctx: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let metadata = event.metadata();
        SystemTime.format_time(&mut out)?;
        write!(out, " {:>5} {}: ", metadata.level(), metadata.target())?;
        let mut text = String::new();
        for span in ctx.event_scope().into_iter().flat_map(|scope| scope.from_root()) {
            text.push_str(span.name());
            if let Some(fields) = span.extensions().get::<FormattedFields<N>>()
                && !fields.is_empty()
            {
                write!(text, "{{{fields}}}")?;
            }
            text.push_str(": ");
        }
        ctx.format_fields(Writer::new(&mut text), event)?;
        for c in text.chars() {
            if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}') {
                write!(out, "{}", c.escape_default())?;
            } else {
                out.write_char(c)?;
            }
        }
        out.write_char('\n')
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use super::*;

    macro_rules! for_each_level {
        ($($target:literal),*) => {$(
            tracing::error!(target: $target, "CANARY");
            tracing::warn!(target: $target, "CANARY");
            tracing::info!(target: $target, "CANARY");
            tracing::debug!(target: $target, "CANARY");
            tracing::trace!(target: $target, "CANARY");
        )*};
    }

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Sink {
        fn take(&self) -> String {
            String::from_utf8(std::mem::take(&mut self.0.lock().unwrap())).unwrap()
        }
    }

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn traced(level: Level, events: impl FnOnce(&'static AtomicUsize)) -> String {
        let sink = Sink::default();
        let writer = sink.clone();
        let stored: &'static AtomicUsize = Box::leak(Box::new(AtomicUsize::new(0)));
        store(stored, level);
        tracing::subscriber::with_default(subscriber(stored, move || writer.clone()), || events(stored));
        sink.take()
    }

    #[test]
    fn foreign_targets_never_print() {
        let printed = traced(Level::TRACE, |_| {
            for_each_level!(
                "vaultrs",
                "vaultrs::api",
                "rustify::client",
                "reqwest::connect",
                "kube_client::client::builder",
                "hyper::proto",
                "hyper_util::client",
                "h2::codec",
                "rustls::client",
                "tonic::transport",
                "tower::buffer",
                "sealmount_other",
                "sealmountx::a"
            );
            tracing::error!(target: "sealmount::csi", "ours");
        });
        assert!(!printed.contains("CANARY"), "{printed}");
        assert!(printed.ends_with("ERROR sealmount::csi: ours\n"), "{printed}");
    }

    #[test]
    fn own_targets_print_up_to_the_level() {
        let printed = traced(Level::INFO, |level| {
            // One call site: it remembers whether it is enabled.
            let debug = |count| tracing::debug!(target: "sealmount::x", count, "second");
            tracing::info!(target: "sealmount", "first");
            debug(2);
            store(level, Level::DEBUG);
            debug(3);
            store(level, Level::WARN);
            tracing::info!(target: "sealmount::x", "hidden");
        });
        let lines: Vec<_> = printed.lines().map(|line| line.split_once("Z ").unwrap().1).collect();
        assert_eq!(lines, [" INFO sealmount: first", "DEBUG sealmount::x: second count=3"]);
    }

    #[test]
    fn an_event_is_one_line() {
        let printed = traced(Level::INFO, |_| {
            let hostile = "a\nb\r\u{1b}[31m\u{2028}c";
            let span = tracing::info_span!(target: "sealmount::csi", "publish", volume = hostile);
            let _entered = span.enter();
            tracing::info!(target: "sealmount::csi", pod = %hostile, "{hostile}");
        });
        assert_eq!(printed.lines().count(), 1, "{printed}");
        assert!(!printed.contains(['\r', '\u{1b}', '\u{2028}']), "{printed:?}");
        assert!(printed.contains("publish{volume="), "{printed}");
    }
}
