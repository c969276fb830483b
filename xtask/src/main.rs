//! Kits, images, demo, tests and benchmarks of vbus.

mod guest;
mod initramfs;
mod kit;
mod lab;
mod machine;
mod process;
mod qmp;
mod workspace;

fn main() -> anyhow::Result<()> {
    let lab = lab::Lab::new(&lab::Options::default())?;
    let vm = machine::Machine::new("a").boot(&lab)?;
    println!("boot {:?}", vm.age());
    let t = std::time::Instant::now();
    println!("{}", vm.guest.ok("uname -a; lsmod; cat /proc/meminfo | head -3; cat /proc/cpuinfo | grep -E 'flags|MHz'; dmesg | tail -3; ls /dev; cat /sys/devices/system/clocksource/clocksource0/current_clocksource")?);
    println!("cmd {:?}", t.elapsed());
    println!(
        "{}",
        vm.guest.ok(
            "echo 32 > /proc/sys/vm/nr_hugepages; grep -i huge /proc/meminfo; dmesg | grep -v -i acpi | tail -40 "
        )?
    );
    let t = std::time::Instant::now();
    println!("{}", vm.guest.ok("dd if=/dev/zero bs=1024 count=256 2>/dev/null")?.len());
    println!("256K out {:?}", t.elapsed());
    vm.power_off()?;
    Ok(())
}
