//! When to fetch again. Pure: what it decides depends on the times it is given.

use std::time::Duration;

use tokio::time::Instant;

/// The first wait after a failed refresh; it doubles with each further one.
const FIRST_RETRY: Duration = Duration::from_secs(5);
/// The longest wait after failed refreshes, where the interval is not shorter.
const LAST_RETRY: Duration = Duration::from_secs(300);
/// The longest wait that a server may ask for (`Retry-After`): it must not keep content from being refreshed for good.
const LONGEST_ASKED: Duration = Duration::from_secs(3600);

/// What drives a volume's refreshes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interval {
    /// The kubelet brings the Secret with every publish, each 60 to 90 s (platform B3).
    Kubelet,
    /// This long after the content was confirmed.
    Every(Duration),
    /// Nothing does.
    Never,
}

/// The rhythm of one volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    interval: Interval,
    confirmed: Instant,
    failures: u32,
    retry: Option<Instant>,
    jitter: u8,
}

impl Pace {
    /// A rhythm that counts from `confirmed`. `jitter` shortens each interval by up to a tenth, so that volumes that
    /// were published together are not fetched together.
    pub fn new(interval: Interval, confirmed: Instant, jitter: u8) -> Self {
        Self { interval, confirmed, failures: 0, retry: None, jitter }
    }

    /// Takes another interval, as after an adoption or a change of the platform's file.
    pub fn set_interval(&mut self, interval: Interval) {
        self.interval = interval;
    }

    /// The source confirmed the content.
    pub fn confirm(&mut self, now: Instant) {
        self.confirmed = now;
        self.failures = 0;
        self.retry = None;
    }

    /// A refresh failed: the next is tried sooner than the interval says, but never in a storm, and not before the
    /// time the server `asked` for.
    pub fn fail(&mut self, now: Instant, asked: Option<Duration>) {
        let wait = FIRST_RETRY.saturating_mul(2_u32.saturating_pow(self.failures.min(16))).min(LAST_RETRY);
        let wait = match self.interval {
            Interval::Every(interval) => wait.min(interval),
            Interval::Kubelet | Interval::Never => wait,
        };
        let wait = wait.max(asked.unwrap_or_default().min(LONGEST_ASKED));
        self.failures = self.failures.saturating_add(1);
        self.retry = now.checked_add(wait);
    }

    /// Whether to fetch at `now`.
    pub fn due(&self, now: Instant) -> bool {
        match (self.interval, self.retry) {
            (Interval::Kubelet, _) => true,
            (_, Some(retry)) => now >= retry,
            (Interval::Never, None) => false,
            (Interval::Every(interval), None) => {
                now.saturating_duration_since(self.confirmed) >= self.jittered(interval)
            }
        }
    }

    /// Whether content whose source confirmed it `age` ago is stale, where `after` is the platform's `stale_after`:
    /// what the kubelet brings is late after that time, what is fetched at an interval that much after the interval.
    pub fn stale(&self, age: Duration, after: Duration) -> bool {
        match self.interval {
            Interval::Kubelet => age > after,
            Interval::Every(interval) => age > interval.saturating_add(after),
            Interval::Never => self.failures > 0 && age > after,
        }
    }

    fn jittered(&self, interval: Duration) -> Duration {
        interval - interval / 10 * u32::from(self.jitter) / 255
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);
    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test]
    async fn an_interval_is_shortened_by_at_most_a_tenth() {
        let start = Instant::now();
        for jitter in [0, 17, 255] {
            let pace = Pace::new(Interval::Every(HOUR), start, jitter);
            assert!(!pace.due(start + HOUR * 9 / 10 - SECOND), "jitter {jitter}");
            assert!(pace.due(start + HOUR), "jitter {jitter}");
        }
        assert!(!Pace::new(Interval::Every(HOUR), start, 0).due(start + HOUR - SECOND));
        assert!(Pace::new(Interval::Every(HOUR), start, 255).due(start + HOUR * 9 / 10 + SECOND));
    }

    #[tokio::test]
    async fn failures_wait_longer_each_time_but_not_longer_than_the_interval() {
        let start = Instant::now();
        let mut pace = Pace::new(Interval::Every(HOUR), start, 0);
        let mut waits = Vec::new();
        for _ in 0..9 {
            pace.fail(start, None);
            waits.push(pace.retry.unwrap() - start);
        }
        assert_eq!(waits[..4], [5, 10, 20, 40].map(Duration::from_secs));
        assert_eq!(waits[8], LAST_RETRY);
        let mut short = Pace::new(Interval::Every(SECOND), start, 0);
        short.fail(start, None);
        assert!(short.due(start + SECOND));
        short.confirm(start + SECOND);
        assert!(!short.due(start + SECOND));
    }

    #[tokio::test]
    async fn a_server_that_asks_for_time_gets_it_within_bounds() {
        let start = Instant::now();
        for (asked, wait) in [(1, 5), (77, 77), (u64::MAX, 3600)] {
            let mut pace = Pace::new(Interval::Every(HOUR), start, 0);
            pace.fail(start, Some(Duration::from_secs(asked)));
            assert_eq!(pace.retry, Some(start + Duration::from_secs(wait)), "asked for {asked} s");
        }
    }

    #[tokio::test]
    async fn what_never_refreshes_is_not_due_and_not_stale_before_something_failed() {
        let start = Instant::now();
        let mut pace = Pace::new(Interval::Never, start, 0);
        assert!(!pace.due(start + HOUR * 1000));
        assert!(!pace.stale(HOUR * 1000, SECOND));
        pace.fail(start, None);
        assert!(pace.due(start + HOUR));
        assert!(pace.stale(HOUR, SECOND));
    }

    #[tokio::test]
    async fn staleness_counts_from_when_the_content_was_due() {
        let start = Instant::now();
        let kubelet = Pace::new(Interval::Kubelet, start, 0);
        assert!(!kubelet.stale(SECOND, SECOND) && kubelet.stale(SECOND * 2, SECOND));
        let every = Pace::new(Interval::Every(HOUR), start, 0);
        assert!(!every.stale(HOUR + SECOND, SECOND) && every.stale(HOUR + SECOND * 2, SECOND));
    }
}
