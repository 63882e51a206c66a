use super::*;

#[test]
fn ranges_blocks_and_port_zero() {
    let set = PortSet::new((0, 4095), &[(100, 200), (3000, 3000)]);
    assert!(
        !set.contains(0)
            && set.contains(1)
            && !set.contains(150)
            && set.contains(4095)
            && !set.contains(4096)
    );
    assert_eq!(set.len(), 4096 - 1 - 101 - 1);
    assert_eq!((set.whole_blocks(), set.some_blocks()), (0b1010, 0b1111));
    assert_eq!(set.iter().count(), 3993);
    assert!(PortSet::new((0, 0), &[]).is_empty());
    assert!(PortSet::new((500, 400), &[]).is_empty(), "an empty range");
    assert_eq!(PortSet::new((0, 65_535), &[(0, 65_535)]).len(), 0);
    assert_eq!((block_of(1023), block_of(1024), block_of(65_535)), (0, 1, 63));
}

#[test]
fn ports_come_and_go() {
    let mut set = PortSet::default();
    set.insert(77);
    assert!(set.contains(77) && set.remove(77) && !set.remove(77) && set.is_empty());
}
