//! The measures of vbus against their peers, in one run.

mod ablation;
mod duel;
mod region;
mod rings;
mod samples;

fn main() {
    let mut s = samples::Samples::new(15);
    rings::sample(&mut s);
    for name in s.figures.keys() {
        let Some(v) = s.of(name) else { continue };
        let group = name.rsplit_once('/').unwrap().0;
        let r = s.ratio(name, &format!("{group}/vbus")).unwrap();
        println!("{name:32} {:8.1} {:8.1} {:8.1}     x {:6.2} {:6.2} {:6.2}", v.low, v.median, v.high, r.low, r.median, r.high);
    }
}
