//! The profile as a table.

use super::{Peak, Row};
use std::fmt::Write;

/// Rows that took less than this share of the time are summed up in one.
const LEAST: f64 = 0.001;

/// The rows as text, the longest time first: time and its share, rates, and the share of what the machine can do. `bound`
/// says which of the two, arithmetic or memory, takes longer at its peak.
pub fn table(rows: &[Row], peak: Option<&Peak>) -> String {
    // From +0: the sum of nothing is −0 and would be printed so.
    let total = rows.iter().fold(0.0, |sum, row| sum + row.seconds);
    let mut out = String::new();
    let (flops, bytes) = rows.iter().fold((0.0, 0.0), |(f, b), row| (f + row.work.flops, b + row.work.bytes));
    let rate = |amount: f64| if total > 0.0 { amount / total / 1e9 } else { 0.0 };
    let _ = writeln!(
        out,
        "transformer_rs profile: {:.1} ms in operations, {:.1} GFLOP/s, {:.1} GB/s",
        1e3 * total,
        rate(flops),
        rate(bytes)
    );
    if let Some(Peak { threads, flops, read, copy }) = peak {
        let _ = writeln!(
            out,
            "measured peak of {threads} threads: {:.1} GFLOP/s (f32), {:.1} GB/s read, {:.1} GB/s copied",
            flops / 1e9,
            read / 1e9,
            copy / 1e9
        );
    }
    let _ = writeln!(
        out,
        "{:<36} {:<8} {:>11} {:>8} {:>9} {:>10} {:>6} {:>8} {:>5} {:>7} {:>5}  bound",
        "operation", "pass", "sizes", "calls", "rows/call", "ms", "share", "GFLOP/s", "peak", "GB/s", "peak"
    );
    let mut sorted: Vec<&Row> = rows.iter().collect();
    sorted.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    let shown = sorted.iter().take_while(|row| row.seconds >= LEAST * total).count();
    for row in &sorted[..shown] {
        line(&mut out, row, total, peak);
    }
    if let (rest @ 1.., seconds) = (sorted.len() - shown, sorted[shown..].iter().map(|row| row.seconds).sum::<f64>()) {
        let _ =
            writeln!(out, "{:<82} {:>10.2} {:>5.1}%", format!("{rest} more"), 1e3 * seconds, 100.0 * seconds / total);
    }
    out
}

fn line(out: &mut String, row: &Row, total: f64, peak: Option<&Peak>) {
    let Row { op, part, pass, sizes, calls, seconds, work } = row;
    let name = if part.is_empty() { op.to_string() } else { format!("{op}: {part}") };
    let sizes: Vec<String> = sizes.iter().filter(|&&n| n > 0).map(usize::to_string).collect();
    // Nothing, where there is nothing to do; a share, where the peak is known.
    let rate = |amount: f64, peak: Option<f64>| {
        let per_second = amount / seconds;
        let shown = amount > 0.0 && per_second.is_finite();
        let share = peak.filter(|_| shown).map(|peak| format!("{:.0}%", 100.0 * per_second / peak));
        (if shown { format!("{:.1}", per_second / 1e9) } else { String::new() }, share.unwrap_or_default())
    };
    let (flops, of_flops) = rate(work.flops, peak.map(|peak| peak.flops));
    let (bytes, of_bytes) = rate(work.bytes, peak.map(|peak| peak.read));
    let bound = match peak {
        Some(peak) if work.flops / peak.flops > work.bytes / peak.read => "arithmetic",
        Some(_) if work.bytes > 0.0 => "memory",
        _ => "",
    };
    let _ = writeln!(
        out,
        "{name:<36} {:<8} {:>11} {calls:>8} {:>9.1} {:>10.2} {:>5.1}% {flops:>8} {of_flops:>5} {bytes:>7} {of_bytes:>5}  {bound}",
        pass.name(),
        sizes.join("x"),
        work.rows / *calls as f64,
        1e3 * seconds,
        100.0 * seconds / total,
    );
}

#[cfg(test)]
mod tests {
    use super::super::{Pass, Work};
    use super::*;

    #[test]
    fn a_row_shows_rates_shares_and_what_bounds_it() {
        let row = |op, pass, seconds, work| Row { op, part: "", pass, sizes: [512, 0], calls: 2, seconds, work };
        let rows = [
            row("layer_norm", Pass::Forward, 0.1, Work { rows: 20.0, flops: 0.0, bytes: 2e9 }),
            row("linear", Pass::Backward, 0.9, Work { rows: 20.0, flops: 90e9, bytes: 1e9 }),
            row("add", Pass::Backward, 1e-6, Work::default()),
        ];
        let peak = Peak { threads: 2, flops: 200e9, read: 40e9, copy: 30e9 };
        let text = table(&rows, Some(&peak));
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].contains("1000.0 ms") && lines[1].contains("200.0 GFLOP/s") && lines.len() == 6, "{text}");
        let words = |line: &str| line.split_whitespace().map(String::from).collect::<Vec<_>>();
        let linear =
            ["linear", "backward", "512", "2", "10.0", "900.00", "90.0%", "100.0", "50%", "1.1", "3%", "arithmetic"];
        assert_eq!(words(lines[3]), linear, "{text}");
        let norm = ["layer_norm", "forward", "512", "2", "10.0", "100.00", "10.0%", "20.0", "50%", "memory"];
        assert_eq!(words(lines[4]), norm, "{text}");
        assert!(lines[5].starts_with("1 more"), "{text}");
        assert!(!table(&rows, None).contains("memory"));
        assert!(table(&[], None).starts_with("transformer_rs profile: 0.0 ms"));
    }
}
